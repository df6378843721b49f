"""``python -m unbraid``."""

from unbraid.cli.main import main

if __name__ == "__main__":
    main()
