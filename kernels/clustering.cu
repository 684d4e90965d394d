// What K-means on rows that are never made takes from the interactions: see gpu_init/kmeans.py, and
// kernels/reference.py for each kernel in two lines.

#include "gather.cuh"

/// Rows of A F - middle, (n, width) of the type they are summed in; row `at` is user rows[at], or `at` without rows.
///
/// A warp takes ROWS rows; rows with more than RUN interactions are left to add_parts.
template <typename T, int E, typename Sum>
__global__ void __launch_bounds__(WARPS * WARP, sizeof(Sum) == 4 ? 6 : 4) aggregate(
    Index n, const Index* rows, const void* indptr, int wide, const int* indices, const float* weights,
    const T* features, Index stride, int width, const double* row_scale, const double* item_scale,
    const double* middle, int groups_log2, Sum* out)
{
    __shared__ Entry<Sum> staged[WARPS][ROWS * ROOM];
    Index first_row = warp_number() * ROWS;
    if (first_row >= n)
        return;
    Entry<Sum>* entries = staged[threadIdx.x / WARP];
    int counts = read_rows_ahead<Sum>(
        entries, {indptr, wide, indices, weights}, first_row, n, rows, row_scale, item_scale);
    Lanes lanes(groups_log2);
    for (int row = 0; row < ROWS; ++row) {
        int count = count_of(counts, row);
        if (count < 0)
            continue;
        for (int start = 0; start < width; start += E * lanes.width) {
            Columns mine(width, start, E, lanes);
            Sum total[E] = {};
            add_rows<true, T, E, 1, Sum>(total, features, stride, mine, lanes, entries + row * ROOM, count);
            sum_groups(total, lanes);
#pragma unroll
            for (int e = 0; e < E; ++e) {
                int column = mine.first + e;
                if (lanes.group == 0 && column < width)
                    out[(first_row + row) * width + column] =
                        (Sum)((double)total[e] - (middle ? middle[column] : 0.0));
            }
        }
    }
}

/// Sum over the lanes of a group; every lane has it.
template <typename Sum>
__device__ __forceinline__ Sum sum_within(Sum value, Lanes lanes)
{
    for (int offset = 1; offset < lanes.width; offset *= 2)
        value += __shfl_xor_sync(ALL, value, offset);
    return value;
}

/// Squared lengths of rows of A F - middle, that are summed in float64 and never stored. Otherwise as `aggregate`.
template <typename T, int E>
__global__ void __launch_bounds__(WARPS * WARP, 4) squared_norms(
    Index n, const void* indptr, int wide, const int* indices, const float* weights, const T* features, Index stride,
    int width, const double* row_scale, const double* item_scale, const double* middle, int groups_log2, double* out)
{
    __shared__ Entry<double> staged[WARPS][ROWS * ROOM];
    Index first_row = warp_number() * ROWS;
    if (first_row >= n)
        return;
    Entry<double>* entries = staged[threadIdx.x / WARP];
    int counts = read_rows_ahead<double>(
        entries, {indptr, wide, indices, weights}, first_row, n, nullptr, row_scale, item_scale);
    Lanes lanes(groups_log2);
    for (int row = 0; row < ROWS; ++row) {
        int count = count_of(counts, row);
        if (count < 0)
            continue;
        double length = 0.0;
        for (int start = 0; start < width; start += E * lanes.width) {
            Columns mine(width, start, E, lanes);
            double total[E] = {};
            add_rows<true, T, E, 1, double>(total, features, stride, mine, lanes, entries + row * ROOM, count);
            sum_groups(total, lanes);
#pragma unroll
            for (int e = 0; e < E; ++e) {
                int column = mine.first + e;
                double apart = column < width ? total[e] - middle[column] : 0.0;
                length = fma(apart, apart, length);
            }
        }
        length = sum_within(length, lanes);
        if (lanes.lane == 0)
            out[first_row + row] = length;
    }
}

/// Squared lengths of the rows of a matrix (n, width), a warp each; length b goes to out[at[b]], or out[b].
template <typename T>
__global__ void __launch_bounds__(WARPS * WARP) lengths(
    Index n, const T* matrix, Index stride, int width, const Index* at, double* out)
{
    Index row = warp_number();
    if (row >= n)
        return;
    Lanes lanes(0);
    double length = 0.0;
#pragma unroll 4
    for (Index column = lanes.lane; column < width; column += WARP) {
        double one = value(load_pack<true, T, 1>(true, matrix + row * stride + column), 0);
        length = fma(one, one, length);
    }
    length = sum_within(length, lanes);
    if (lanes.lane == 0)
        out[at ? at[row] : row] = length;
}

/// The least and second least of some scores, and whose the least is, the first of equals.
struct Nearest {
    int label;
    double least, second;

    __device__ void look(int other, double score)
    {
        second = score < least ? least : (score < second ? score : second);
        if (score < least) {
            least = score;
            label = other;
        }
    }
    __device__ void merge(const Nearest& other)
    {
        bool theirs = other.least < least || (other.least == least && other.label < label);
        double loser = theirs ? least : other.least;
        second = other.second < second ? other.second : second;
        second = loser < second ? loser : second;
        label = theirs ? other.label : label;
        least = theirs ? other.least : least;
    }
};

__device__ __forceinline__ Nearest nothing_yet()
{
    double infinity = __longlong_as_double(0x7ff0000000000000LL);
    return {0x7fffffff, infinity, infinity};
}

/// The nearest over the lanes of a group; 0 where no score is less than infinity.
__device__ __forceinline__ Nearest nearest_within(Nearest mine, Lanes lanes)
{
    for (int offset = 1; offset < lanes.width; offset *= 2) {
        Nearest other;
        other.label = __shfl_xor_sync(ALL, mine.label, offset);
        other.least = __shfl_xor_sync(ALL, mine.least, offset);
        other.second = __shfl_xor_sync(ALL, mine.second, offset);
        mine.merge(other);
    }
    mine.label = mine.label == 0x7fffffff ? 0 : mine.label;
    return mine;
}

/// Nearest centroid of user rows[at] by norms[k] - 2 (A table)[user][k], table (I, clusters), summed in float64.
///
/// A warp takes ROWS rows; those with more than RUN interactions are left to add_parts and nearest_two.
template <typename T, int E>
__global__ void __launch_bounds__(WARPS * WARP, 4) assign(
    Index n, const Index* rows, const void* indptr, int wide, const int* indices, const float* weights,
    const T* table, Index stride, int clusters, const double* row_scale, const double* item_scale, const double* norms,
    int groups_log2, int* labels, double* least, double* second)
{
    __shared__ Entry<double> staged[WARPS][ROWS * ROOM];
    Index first_row = warp_number() * ROWS;
    if (first_row >= n)
        return;
    Entry<double>* entries = staged[threadIdx.x / WARP];
    int counts = read_rows_ahead<double>(
        entries, {indptr, wide, indices, weights}, first_row, n, rows, row_scale, item_scale);
    Lanes lanes(groups_log2);
    for (int row = 0; row < ROWS; ++row) {
        int count = count_of(counts, row);
        if (count < 0)
            continue;
        Nearest nearest = nothing_yet();
        for (int start = 0; start < clusters; start += E * lanes.width) {
            Columns mine(clusters, start, E, lanes);
            double total[E] = {};
            add_rows<true, T, E, 1, double>(total, table, stride, mine, lanes, entries + row * ROOM, count);
            sum_groups(total, lanes);
#pragma unroll
            for (int e = 0; e < E; ++e)
                if (mine.first + e < clusters)
                    nearest.look(mine.first + e, norms[mine.first + e] - 2.0 * total[e]);
        }
        nearest = nearest_within(nearest, lanes);
        if (lanes.lane == 0) {
            labels[first_row + row] = nearest.label;
            least[first_row + row] = nearest.least;
            second[first_row + row] = nearest.second;
        }
    }
}

/// As `assign`, for rows whose products with the centroids (n, clusters) are there; row b goes to place at[b], or b.
template <typename T>
__global__ void __launch_bounds__(WARPS * WARP) nearest_two(
    Index n, const T* products, int clusters, const double* norms, int groups_log2, const Index* at, int* labels,
    double* least, double* second)
{
    Lanes lanes(groups_log2);
    Index row = warp_number() * lanes.groups + lanes.group;
    Nearest nearest = nothing_yet();
    if (row < n)
        for (int cluster = lanes.within; cluster < clusters; cluster += lanes.width)
            nearest.look(cluster, norms[cluster] - 2.0 * (double)products[row * clusters + cluster]);
    nearest = nearest_within(nearest, lanes);
    if (row < n && lanes.within == 0) {
        Index place = at ? at[row] : row;
        labels[place] = nearest.label;
        least[place] = nearest.least;
        second[place] = nearest.second;
    }
}

/// Rows and points that a lane has sums for at a time (cuda.py: ITEMS).
constexpr int ITEMS = 4, POINTS = 8;

/// (F - middle) P^T, (n, clusters), for points P (clusters, width): a warp takes ITEMS rows of F, which it reads once
/// for POINTS points; as many points are read once for ITEMS rows.
template <typename T, int E, typename Sum>
__global__ void __launch_bounds__(WARPS * WARP, E == 8 || sizeof(Sum) == 8 ? 2 : 4) products(
    Index n, const T* features, Index stride, int width, const Sum* middle, const Sum* points, int clusters, Sum* out)
{
    Index first = warp_number() * ITEMS;
    Lanes lanes(0);
    for (int start = 0; start < clusters; start += POINTS) {
        Sum sums[ITEMS][POINTS] = {};
        for (int column = lanes.lane * E; column < width; column += WARP * E) {
            Pack<T, E> packs[ITEMS];
#pragma unroll
            for (int item = 0; item < ITEMS; ++item)
                packs[item] =
                    load_pack<false, T, E>(first + item < n, features + (first + item) * stride + column);
            Pack<Sum, E> centre = load_pack<false, Sum, E>(true, middle + column);
            Sum apart[ITEMS][E];
#pragma unroll
            for (int item = 0; item < ITEMS; ++item)
#pragma unroll
                for (int e = 0; e < E; ++e)
                    apart[item][e] = (Sum)value(packs[item], e) - value(centre, e);
#pragma unroll
            for (int point = 0; point < POINTS; ++point) {
                Pack<Sum, E> values = load_pack<false, Sum, E>(
                    start + point < clusters, points + (Index)(start + point) * width + column);
#pragma unroll
                for (int item = 0; item < ITEMS; ++item)
#pragma unroll
                    for (int e = 0; e < E; ++e)
                        sums[item][point] = fma(apart[item][e], value(values, e), sums[item][point]);
            }
        }
#pragma unroll
        for (int item = 0; item < ITEMS; ++item)
#pragma unroll
            for (int point = 0; point < POINTS; ++point) {
                Sum sum = sum_within(sums[item][point], lanes);
                if (lanes.lane == 0 && first + item < n && start + point < clusters)
                    out[(first + item) * clusters + start + point] = sum;
            }
    }
}

constexpr int SUMMED_AT_ONCE = 4;

/// partial[c] = T^T F over the c-th `length` rows, (clusters, width) in float64, for T (n, clusters): a warp takes
/// 32 * E columns of them. A row of F counts only where its factor is not 0, whatever it holds.
template <typename T, int E>
__global__ void __launch_bounds__(WARPS * WARP, 2) table_sums(
    Index n, const double* table, int clusters, const T* features, Index stride, int width, Index length,
    Index tiles, double* partial)
{
    Index warp = warp_number(), chunk = warp / tiles;
    Index first = chunk * length, last = first + length < n ? first + length : n;
    Index column = (warp % tiles * WARP + threadIdx.x % WARP) * E;
    if (first >= n || column >= width)
        return;
    for (int start = 0; start < clusters; start += POINTS) {
        double sums[POINTS][E] = {};
        for (Index row = first; row < last; row += SUMMED_AT_ONCE) {
            Pack<T, E> packs[SUMMED_AT_ONCE];
#pragma unroll
            for (int one = 0; one < SUMMED_AT_ONCE; ++one)
                packs[one] = load_pack<true, T, E>(row + one < last, features + (row + one) * stride + column);
#pragma unroll
            for (int one = 0; one < SUMMED_AT_ONCE; ++one)
#pragma unroll
                for (int point = 0; point < POINTS; ++point) {
                    bool there = row + one < last && start + point < clusters;
                    double factor = there ? __ldg(table + (row + one) * clusters + start + point) : 0.0;
                    if (factor != 0.0)
#pragma unroll
                        for (int e = 0; e < E; ++e)
                            sums[point][e] = fma(factor, (double)value(packs[one], e), sums[point][e]);
                }
        }
#pragma unroll
        for (int point = 0; point < POINTS; ++point)
#pragma unroll
            for (int e = 0; e < E; ++e)
                if (start + point < clusters)
                    partial[(chunk * clusters + start + point) * width + column + e] = sums[point][e];
    }
}

/// Writes down labels, and bounds on the distances they follow from: see kernels/reference.py.
__global__ void __launch_bounds__(WARPS * WARP) note(
    Index n, const Index* rows, const int* found, const double* least, const double* second, const double* norms,
    const double* reach, double fall, int* labels, double* upper, double* lower, int* before)
{
    Index at = (Index)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n)
        return;
    Index row = rows[at];
    double norm = norms[row];
    upper[row] = sqrt(fmax(least[at] + norm, 0.0)) - reach[found[at]];
    lower[row] = sqrt(fmax(second[at] + norm, 0.0)) + fall;
    before[at] = labels[row];
    labels[row] = found[at];
}

/// Marks rows whose label may change.
__global__ void __launch_bounds__(WARPS * WARP) in_doubt(
    Index n, const int* labels, const double* upper, const double* lower, const double* reach, double fall,
    unsigned char* doubtful)
{
    Index at = (Index)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < n)
        doubtful[at] = upper[at] + reach[labels[at]] > lower[at] - fall;
}

constexpr int COUNTED = 1024;   // labels that a block counts in shared memory
constexpr int PER_THREAD = 16;  // labels that a thread looks at (cuda.py: COUNTED_PER_THREAD)

/// counts[label] += sign for each of n labels that is not negative.
__global__ void __launch_bounds__(WARPS * WARP) count_labels(
    Index n, const int* labels, int clusters, long long sign, unsigned long long* counts)
{
    __shared__ unsigned long long own[COUNTED];
    int held = clusters < COUNTED ? clusters : COUNTED;
    for (int label = (int)threadIdx.x; label < held; label += WARPS * WARP)
        own[label] = 0;
    __syncthreads();
    Index start = (Index)blockIdx.x * blockDim.x * PER_THREAD + threadIdx.x;
    for (int one = 0; one < PER_THREAD; ++one) {
        Index at = start + (Index)one * blockDim.x;
        int label = at < n ? labels[at] : -1;
        if (label >= 0)
            atomicAdd(label < held ? own + label : counts + label, (unsigned long long)(label < held ? 1 : sign));
    }
    __syncthreads();
    for (int label = (int)threadIdx.x; label < held; label += WARPS * WARP)
        if (own[label])
            atomicAdd(counts + label, own[label] * (unsigned long long)sign);
}

constexpr int TILE = 256;  // interactions that a warp takes in label_sums, however they lie in rows (cuda.py: TILE)

/// fixed[item][label] += A[user][item], in units that make whole numbers of it: whole numbers add up to the same
/// whatever the order, so that atomics may bring them in any.
///
/// The interactions of users rows[0], rows[1], ... are numbered through; row b starts with number starts[b], and
/// tile t, the warp's, with row tiles[t]. So no warp waits for a busy user.
__global__ void __launch_bounds__(WARPS * WARP) label_sums(
    Index n_tiles, const Index* tiles, Index n, const Index* starts, const Index* rows, const int* labels,
    const void* indptr, int wide, const int* indices, const float* weights, const double* row_scale,
    const double* item_scale, int clusters, double per_unit, unsigned long long* fixed)
{
    Index tile = warp_number();
    if (tile >= n_tiles)
        return;
    Interactions interactions{indptr, wide, indices, weights};
    int lane = (int)(threadIdx.x % WARP);
    Index from = tile * TILE, to = from + TILE;
    for (Index at = tiles[tile]; at < n && starts[at] < to; ++at) {
        Index user = rows[at], start = interactions.start(user) - starts[at];
        Index last = starts[at + 1] < to ? starts[at + 1] : to;
        double share = row_scale[user] * per_unit;
        int label = labels[at];
        for (Index number = (starts[at] > from ? starts[at] : from) + lane; number < last; number += WARP) {
            int item = __ldg(interactions.indices + start + number);
            double part = share * interactions.weight(start + number) * __ldg(item_scale + item);
            if (part != 0.0)
                atomicAdd(fixed + (Index)item * clusters + label, (unsigned long long)__double2ll_rn(part));
        }
    }
}

/// sums += unit * fixed, value by value.
__global__ void __launch_bounds__(256) add_fixed(Index n, const long long* fixed, double unit, double* sums)
{
    Index at = (Index)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < n)
        sums[at] = fma(unit, (double)fixed[at], sums[at]);
}
