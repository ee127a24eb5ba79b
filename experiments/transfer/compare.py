"""Compares detectors or segmenters from several backbones.

The same program as experiments/compare.py:

python experiments/transfer/compare.py table4 --data COCO --weights baseline:resnet18=EXPORT ...
"""

import sys

from experiments.compare import main

if __name__ == "__main__":
    sys.exit(main())
