"""`python -m laconic` is the command `laconic`."""

from laconic.command.start import main

if __name__ == "__main__":
    main()
