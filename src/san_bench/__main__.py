"""Runs the `san` command as `python -m san_bench`."""

from san_bench.entry import main

if __name__ == "__main__":
    main()
