// Loads and conversions in PTX, because NVRTC has built-in functions for them only if it finds CUDA's headers.
#ifndef GPU_INIT_DEVICE_CUH
#define GPU_INIT_DEVICE_CUH

#ifdef __CUDACC__  // a build for the host brings its own (tests/support/shim/cuda.h)

// load<ONCE>(wanted, from, words...) loads read-only words from `from`, or leaves the words unchanged if not wanted.
// The load is predicated instead of in a branch, so that several loads are in flight at once. With ONCE the words do
// not go to the first-level cache.

template <bool ONCE>
__device__ __forceinline__ void load(
    bool wanted, const void* from, unsigned& a, unsigned& b, unsigned& c, unsigned& d)
{
    if constexpr (ONCE)
        asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %5, 0;\n\t"
            "@p ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
            : "+r"(a), "+r"(b), "+r"(c), "+r"(d)
            : "l"(from), "r"((int)wanted));
    else
        asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %5, 0;\n\t"
            "@p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
            : "+r"(a), "+r"(b), "+r"(c), "+r"(d)
            : "l"(from), "r"((int)wanted));
}

template <bool ONCE>
__device__ __forceinline__ void load(bool wanted, const void* from, unsigned& a, unsigned& b)
{
    asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %3, 0;\n\t@p ld.global.nc.v2.b32 {%0, %1}, [%2];\n\t}"
        : "+r"(a), "+r"(b)
        : "l"(from), "r"((int)wanted));
}

template <bool ONCE>
__device__ __forceinline__ void load(bool wanted, const void* from, unsigned& a)
{
    asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\t@p ld.global.nc.b32 %0, [%1];\n\t}"
        : "+r"(a)
        : "l"(from), "r"((int)wanted));
}

template <bool ONCE>
__device__ __forceinline__ void load(bool wanted, const void* from, unsigned short& a)
{
    asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\t@p ld.global.nc.b16 %0, [%1];\n\t}"
        : "+h"(a)
        : "l"(from), "r"((int)wanted));
}

__device__ __forceinline__ float float_of_half(unsigned short bits)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

/// Rounds to nearest even, to infinity from 65520 on.
__device__ __forceinline__ unsigned short half_of_float(float value)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#endif
#endif
