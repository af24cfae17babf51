"""`python -m laconic` is the command `laconic`."""

from laconic.start import main

if __name__ == "__main__":
    main()
