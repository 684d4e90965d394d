"""What needs a CUDA device. Wanted: cupy, numpy, pytest, and this package, for which no other library is needed here:

python3 -m pip install --no-deps --no-build-isolation --editable .
python3 -m pytest tests/gpu
"""
