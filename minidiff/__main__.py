import sys

from minidiff.cli.main import main

sys.exit(main())
