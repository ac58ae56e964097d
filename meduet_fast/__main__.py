"""The program ``meduet-fast``, as ``python -m meduet_fast`` too; asks for its extra where that is absent."""

import sys

from .errors import MissingExtra, needs_extra


def main() -> int:
    """Run the program; returns its exit code."""
    try:
        with needs_extra("train"):
            from . import cli
    except MissingExtra as error:
        print(f"meduet-fast: {error}", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
