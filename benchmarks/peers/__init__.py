"""The contestants of ``round_time.py``: one file each, all with the same model, loss, windows and number of steps."""
