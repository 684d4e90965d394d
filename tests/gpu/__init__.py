"""What needs a CUDA device. ``make test-gpu`` installs all that is wanted.

For the kernels alone (test_kernels) cupy, numpy, pytest and this package are enough:

python3 -m pip install --no-deps --no-build-isolation --editable .
python3 -m pytest tests/gpu
"""
