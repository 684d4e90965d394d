// Gathers and sums rows of a table by a warp. All kernels over the interactions share this code.
#ifndef GPU_INIT_GATHER_CUH
#define GPU_INIT_GATHER_CUH

#include "device.cuh"

typedef long long Index;  // counts rows, interactions and values, of which there may be more than 2^31

constexpr int WARP = 32;               // threads of a warp, called lanes
constexpr unsigned ALL = 0xffffffffu;  // mask of all lanes of a warp
constexpr int WARPS = 4;               // warps of a block (cuda.py: THREADS)
constexpr int ROWS = 8;                // rows that a warp takes, one after another (cuda.py: ROWS)
constexpr int RUN = 64;                // interactions of one sum in float32; longer rows are split (cuda.py: LONGEST)
constexpr int ROOM = RUN + 4;          // entries of a row in shared memory; the 4 let rows start at different banks
constexpr int AT_ONCE = 4;             // interactions that a lane reads ahead at a time
constexpr int WIDE_LOADS = 8;          // loads of 16 bytes that a lane has in flight: more would need more registers
constexpr int NARROW_LOADS = 12;       // the same for smaller loads

struct Half {
    unsigned short bits;
};

/// E values of a row, as one lane loads them: 16 bytes where width and alignment allow it.
template <typename T, int E>
struct Pack {
    static constexpr int BYTES = E * (int)sizeof(T);
    static constexpr int WORDS = BYTES < 4 ? 1 : BYTES / 4;
    unsigned words[WORDS];
};

/// The values of a pack; zeros, and no read, if it is not wanted.
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

/// How a warp shares a row: each of `width` lanes loads E columns, V times. If one load per lane is enough (V = 1), a
/// warp can have several groups of `width` lanes, which process different interactions of the same user and are summed
/// at the end.
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

/// The columns of a lane in one pass over rows of `width` values: `first + v * step + e` for v < V, e < E.
struct Columns {
    int width, first, step;

    __device__ Columns(int width, int start, int values, Lanes lanes)
        : width(width), first(start + lanes.within * values), step(lanes.width * values)
    {
    }
};

/// Interactions by user: row pointers, starting at any offset into the other two.
struct Interactions {
    const Index* indptr;
    const int* indices;
    const float* weights;  // null: each interaction weighs 1

    __device__ Index start(Index row) const { return __ldg(indptr + row); }
    __device__ double weight(Index entry) const { return weights ? (double)__ldg(weights + entry) : 1.0; }
};

/// A row to be added, and its factor.
template <typename Sum>
struct Entry {
    int row;
    Sum factor;
};

/// Writes the entries of `count` interactions from `first` on to shared memory: make(item, weight) gives each of them,
/// and lane `own` of `sharing` lanes takes interactions own, own + sharing, own + 2 * sharing, ...
template <typename Sum, typename Make>
__device__ __forceinline__ void read_ahead(
    Entry<Sum>* entries, Interactions interactions, Index first, int count, int own, int sharing, Make make)
{
    for (int start = own; start < count; start += AT_ONCE * sharing) {
        int items[AT_ONCE];
        double weights[AT_ONCE];
        Entry<Sum> made[AT_ONCE];
#pragma unroll
        for (int one = 0; one < AT_ONCE; ++one) {
            int at = start + one * sharing;
            items[one] = at < count ? __ldg(interactions.indices + first + at) : 0;
            weights[one] = at < count ? interactions.weight(first + at) : 0.0;
        }
#pragma unroll
        for (int one = 0; one < AT_ONCE; ++one)
            made[one] = make(items[one], weights[one]);
#pragma unroll
        for (int one = 0; one < AT_ONCE; ++one)
            if (start + one * sharing < count)
                entries[start + one * sharing] = made[one];
    }
}

/// Makes the entries of a user's interactions for a row of A F.
template <typename Sum>
struct OfFeatures {
    double share;
    const double* item_scale;  // null: 1 for each item

    __device__ Entry<Sum> operator()(int item, double weight) const
    {
        return {item, (Sum)(share * weight * (item_scale ? __ldg(item_scale + item) : 1.0))};
    }
};

/// Makes the entries for the mean of the items' centroids; an item with a negative label adds nothing.
template <typename Sum>
struct OfCentroids {
    double share;
    const int* labels;

    __device__ Entry<Sum> operator()(int item, double weight) const
    {
        int label = __ldg(labels + item);
        return {label, label < 0 ? (Sum)0 : (Sum)(share * weight)};
    }
};

/// total += sum of factor * table[row] over the first `count` entries.
///
/// Rows whose factor is 0 are not read. A group takes DEPTH rows at a time: their loads are all issued before the
/// first is used, and they are summed apart, so that roundings of a long sum stay few.
template <bool ONCE, typename T, int E, int V, typename Sum>
__device__ __forceinline__ void add_rows(
    Sum (&total)[V * E], const T* table, Index stride, Columns columns, Lanes lanes,
    const Entry<Sum>* entries, int count)
{
    constexpr int BYTES = Pack<T, E>::BYTES;
    constexpr int LOADS = V * (BYTES > 16 ? BYTES / 16 : 1);
    constexpr int DEPTH = ((BYTES < 16 ? NARROW_LOADS : WIDE_LOADS) + LOADS - 1) / LOADS;
    for (int start = 0; start < count; start += DEPTH * lanes.groups) {
        Pack<T, E> packs[DEPTH][V];
        Sum factors[DEPTH];
#pragma unroll
        for (int depth = 0; depth < DEPTH; ++depth) {
            int at = start + depth * lanes.groups + lanes.group;
            Entry<Sum> entry = entries[at < count ? at : 0];
            factors[depth] = at < count ? entry.factor : (Sum)0;
            const T* values = table + entry.row * stride;
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

/// Replaces the total of every group with the sum of all groups.
template <int N, typename Sum>
__device__ __forceinline__ void sum_groups(Sum (&total)[N], Lanes lanes)
{
    for (int offset = lanes.width; offset < WARP; offset *= 2)
#pragma unroll
        for (int n = 0; n < N; ++n)
            total[n] += __shfl_xor_sync(ALL, total[n], offset);
}

#endif
