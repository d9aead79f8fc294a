"""``python -m rlif_lightning``."""

from rlif_lightning.main import main

if __name__ == "__main__":
    main()
