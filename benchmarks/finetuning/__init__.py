"""Federated fine-tuning, measured: the tables of ``docs/finetuning-evidence.md``."""
