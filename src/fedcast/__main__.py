"""``python -m fedcast`` is ``fedcast``."""

from __future__ import annotations

from fedcast.cli.main import main

if __name__ == "__main__":
    main()
