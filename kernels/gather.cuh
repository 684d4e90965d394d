// Rows of a table, gathered and summed by a warp: what all kernels over the interactions share.
#ifndef GPU_INIT_GATHER_CUH
#define GPU_INIT_GATHER_CUH

#include "device.cuh"

typedef long long Index;  // of rows, interactions and values: each may pass 2^31

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr int RUN = 64;  // interactions that one sum in float32 takes; longer rows are split (cuda.py: LONGEST)
constexpr int WIDE_LOADS = 8, NARROW_LOADS = 12;  // in flight per lane, of 16 bytes or less: registers set the bound

struct Half {
    unsigned short bits;
};

struct Bfloat16 {
    unsigned short bits;
};

/// E values of a row, as one lane loads them: 16 bytes where width and alignment allow it.
template <typename T, int E>
struct Pack {
    static constexpr int BYTES = E * (int)sizeof(T);
    static constexpr int WORDS = BYTES < 4 ? 1 : BYTES / 4;
    unsigned words[WORDS];
};

/// Values of a pack, or zeros where it is not wanted: then nothing is read.
template <bool ONCE, typename T, int E>
__device__ __forceinline__ Pack<T, E> load_pack(bool wanted, const T* from)
{
    Pack<T, E> pack;
#pragma unroll
    for (int word = 0; word < pack.WORDS; ++word)
        pack.words[word] = 0;
    if constexpr (pack.BYTES >= 16) {
#pragma unroll
        for (int word = 0; word < pack.WORDS; word += 4)
            load<ONCE>(wanted, (const char*)from + 4 * word, pack.words[word], pack.words[word + 1],
                       pack.words[word + 2], pack.words[word + 3]);
    } else if constexpr (pack.BYTES == 8) {
        load<ONCE>(wanted, from, pack.words[0], pack.words[1]);
    } else if constexpr (pack.BYTES == 4) {
        load<ONCE>(wanted, from, pack.words[0]);
    } else {
        unsigned short bits = 0;
        load<ONCE>(wanted, from, bits);
        pack.words[0] = bits;
    }
    return pack;
}

template <int E>
__device__ __forceinline__ float value(const Pack<float, E>& pack, int at)
{
    return __uint_as_float(pack.words[at]);
}

template <int E>
__device__ __forceinline__ double value(const Pack<double, E>& pack, int at)
{
    return __hiloint2double((int)pack.words[2 * at + 1], (int)pack.words[2 * at]);
}

template <int E>
__device__ __forceinline__ float value(const Pack<Half, E>& pack, int at)
{
    return float_of_half((unsigned short)(pack.words[at / 2] >> (16 * (at % 2))));
}

template <int E>
__device__ __forceinline__ float value(const Pack<Bfloat16, E>& pack, int at)  // the upper half of a float32
{
    return __uint_as_float(at % 2 ? pack.words[at / 2] & 0xffff0000u : pack.words[at / 2] << 16);
}

/// How a warp shares a row: `width` lanes take E columns each, V times over. Where one load per lane is enough (V 1),
/// narrow rows leave room for several groups of so many lanes, which take different interactions of the same user and
/// are summed at the end.
struct Lanes {
    int lane, groups, width, group, within;

    __device__ Lanes(int groups_log2)
        : lane((int)(threadIdx.x % WARP)), groups(1 << groups_log2), width(WARP >> groups_log2),
          group(lane >> (5 - groups_log2)), within(lane & (width - 1))
    {
    }
};

/// The warp's number in the grid.
__device__ __forceinline__ Index warp_number()
{
    return ((Index)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
}

/// Columns that a lane takes in one pass over rows of some width: `first + v * step + e` for v < V, e < E.
struct Columns {
    int width, first, step;

    __device__ Columns(int width, int start, int values, Lanes lanes)
        : width(width), first(start + lanes.within * values), step(lanes.width * values)
    {
    }
};

/// Interactions by user: row pointers of 32 or 64 bits, starting at any offset into the other two.
struct Interactions {
    const void* indptr;
    int wide;
    const int* indices;
    const float* weights;  // null: each interaction weighs 1

    __device__ Index start(Index row) const
    {
        return wide ? __ldg((const long long*)indptr + row) : (Index)__ldg((const int*)indptr + row);
    }
    __device__ double weight(Index entry) const { return weights ? (double)__ldg(weights + entry) : 1.0; }
};

/// total += sum of factor * table[row] over the rows and factors that the first `count` lanes hold.
///
/// Rows whose factor is 0 are not read. A group takes DEPTH rows at a time: their loads are all issued before the
/// first is used, and they are summed apart, so that roundings of a long sum stay few.
template <bool ONCE, typename T, int E, int V, typename Sum>
__device__ __forceinline__ void add_rows(
    Sum (&total)[V * E], const T* table, Index stride, Columns columns, Lanes lanes, int row, Sum factor, int count)
{
    constexpr int BYTES = Pack<T, E>::BYTES;
    constexpr int LOADS = V * (BYTES > 16 ? BYTES / 16 : 1);
    constexpr int DEPTH = ((BYTES < 16 ? NARROW_LOADS : WIDE_LOADS) + LOADS - 1) / LOADS;
    for (int start = 0; start < count; start += DEPTH * lanes.groups) {
        Pack<T, E> packs[DEPTH][V];
        Sum factors[DEPTH];
#pragma unroll
        for (int depth = 0; depth < DEPTH; ++depth) {
            int holder = start + depth * lanes.groups + lanes.group;
            int its_row = __shfl_sync(ALL, row, holder % WARP);
            Sum its_factor = __shfl_sync(ALL, factor, holder % WARP);
            factors[depth] = holder < count ? its_factor : (Sum)0;
            const T* values = table + its_row * stride;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                int column = columns.first + v * columns.step;
                bool wanted = factors[depth] != (Sum)0 && column < columns.width;
                packs[depth][v] = load_pack<ONCE, T, E>(wanted, values + column);
            }
        }
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
            for (int e = 0; e < E; ++e) {
                Sum sum = 0;
#pragma unroll
                for (int depth = 0; depth < DEPTH; ++depth)
                    sum = fma(factors[depth], (Sum)value(packs[depth][v], e), sum);
                total[v * E + e] += sum;
            }
    }
}

/// Every group's total becomes that of all groups.
template <int N, typename Sum>
__device__ __forceinline__ void sum_groups(Sum (&total)[N], Lanes lanes)
{
    for (int offset = lanes.width; offset < WARP; offset *= 2)
#pragma unroll
        for (int n = 0; n < N; ++n)
            total[n] += __shfl_xor_sync(ALL, total[n], offset);
}

/// total += share * sum of w_i s_i F_i over interactions first to last, a lane reading each's index and factors;
/// with labels of items, += mean_share * sum of w_i C[label_i] over those whose label is not negative, too.
template <typename T, int E, int V, typename Sum>
__device__ __forceinline__ void gather(
    Sum (&total)[V * E], Interactions interactions, Index first, Index last, double share, const double* item_scale,
    const T* features, Index stride, Columns columns, Lanes lanes, const int* item_labels = nullptr,
    double mean_share = 0.0, const float* centroids = nullptr)
{
    for (Index base = first; base < last; base += WARP) {
        int count = last - base < WARP ? (int)(last - base) : WARP;
        int item = 0, label = 0;
        double factor = 0.0, label_factor = 0.0;
        if (lanes.lane < count) {
            item = __ldg(interactions.indices + base + lanes.lane);
            double weight = interactions.weight(base + lanes.lane);
            factor = share * weight * (item_scale ? __ldg(item_scale + item) : 1.0);
            if (item_labels) {
                label = __ldg(item_labels + item);
                label_factor = label < 0 ? 0.0 : mean_share * weight;
            }
        }
        add_rows<true, T, E, V, Sum>(total, features, stride, columns, lanes, item, (Sum)factor, count);
        if (item_labels)
            add_rows<false, float, E, V, Sum>(
                total, centroids, columns.width, columns, lanes, label, (Sum)label_factor, count);
    }
}

#endif
