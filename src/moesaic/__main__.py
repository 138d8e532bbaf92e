"""`python -m moesaic`: what torchrun starts."""

from moesaic.launch.cli import main

if __name__ == "__main__":
    main()
