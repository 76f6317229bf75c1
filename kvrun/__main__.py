"""python -m kvrun"""

import sys

from kvrun.cli.main import main

sys.exit(main())
