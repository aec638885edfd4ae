"""`python -m mistudio`: the command line, for `torchrun … -m mistudio train …`."""

from mistudio.cli import main

if __name__ == "__main__":
    main()
