#!/bin/sh
# Removes from the libraries what no job runs: tests, what only compilers and editors read, Arrow's RPC and its own way to
# S3, symbols that nothing links with, what botocore knows of Amazon's other services. The headers of CuPy and CUDA stay,
# which kernels are compiled with.
set -eu
cd /opt/gpu-init/lib/python3*/site-packages
find . -type d -name tests -prune -exec rm -rf {} +
find . -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' \) -delete
rm -rf pyarrow/include pyarrow/*_flight*.so* pyarrow/*_s3*.so*
# A wheel has no links, so one library lies there under each of its names.
for library in pyarrow/*.so.*.*.*; do
    for name in "${library%.*.*.*}" "${library%.*.*}"; do
        if cmp -s "$name" "$library"; then ln -sf "$(basename "$library")" "$name"; fi
    done
done
find llvmlite pyarrow -type f -name 'lib*.so*' -exec strip --strip-unneeded {} +
cd botocore/data
find . -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts ! -name 'sso*' ! -name signin -exec rm -rf {} +
