#!/usr/bin/env python3
"""Make the development CA and the leaf for localhost beside this file (or in the folder named); they are git-ignored."""

import sys
from pathlib import Path

from ktlsd import devcert

if __name__ == "__main__":
    made = devcert.ensure(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
    print(f"certificate {made.cert}\nkey         {made.key}\ntrust       {made.ca}")
