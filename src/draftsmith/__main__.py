"""`python -m draftsmith`, for `torchrun … -m draftsmith train`."""

from draftsmith.cli import main

if __name__ == "__main__":
    main()
