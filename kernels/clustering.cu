// Kernels for K-means on the rows of A F, which are never stored: gpu_init/kmeans.py calls them, and
// kernels/reference.py says in a few lines of array code what each of them computes. All sums are in float64.

#include "gather.cuh"

/// A F for n users, as the kernels below take it.
template <typename T>
struct Operator {
    Interactions interactions;
    const T* features;
    Index stride;  // values from one row of features to the next
    int width;
    const double* row_scale;   // null: 1 for each user
    const double* item_scale;  // null: 1 for each item
};

/// Computes rows of A F: a warp takes ROWS users, and users with more than RUN interactions are left to add_parts.
///
/// For each user, `add(user, column, value)` is called for every column, by all groups of lanes alike, and then
/// `finish(user)` once by every lane.
template <int E, typename T, typename Add, typename Finish>
__device__ __forceinline__ void for_each_row(Index n, Operator<T> of, Lanes lanes, Add add, Finish finish)
{
    constexpr int SHARING = WARP / ROWS;  // lanes that read the interactions of one user
    __shared__ Entry<double> staged[WARPS][ROWS * ROOM];
    Index first_user = warp_number() * ROWS;
    if (first_user >= n)
        return;
    Entry<double>* entries = staged[threadIdx.x / WARP];
    Index own = first_user + lanes.lane / SHARING;
    int own_count = -1;  // -1: there is no such user, or it is left to add_parts
    if (own < n) {
        Index first = of.interactions.start(own), last = of.interactions.start(own + 1);
        double share = of.row_scale ? of.row_scale[own] : 1.0;
        own_count = share == 0.0 ? 0 : last - first <= RUN ? (int)(last - first) : -1;
        read_ahead<double>(
            entries + lanes.lane / SHARING * ROOM, of.interactions, first, own_count, lanes.lane % SHARING, SHARING,
            OfFeatures<double>{share, of.item_scale});
    }
    __syncwarp();
    for (int row = 0; row < ROWS; ++row) {
        int count = __shfl_sync(ALL, own_count, row * SHARING);
        if (count < 0)
            continue;
        for (int start = 0; start < of.width; start += E * lanes.width) {
            Columns mine(of.width, start, E, lanes);
            double total[E] = {};
            add_rows<true, T, E, 1, double>(total, of.features, of.stride, mine, lanes, entries + row * ROOM, count);
            sum_groups(total, lanes);
#pragma unroll
            for (int e = 0; e < E; ++e)
                if (mine.first + e < of.width)
                    add(first_user + row, mine.first + e, total[e]);
        }
        finish(first_user + row);
    }
}

/// Sum over the lanes of a group; every lane has it.
__device__ __forceinline__ double sum_within(double value, Lanes lanes)
{
    for (int offset = 1; offset < lanes.width; offset *= 2)
        value += __shfl_xor_sync(ALL, value, offset);
    return value;
}

/// A F - offset, (n, width), without the rows that are left to add_parts.
template <typename T, int E>
__global__ void __launch_bounds__(WARPS * WARP, 4) aggregate(
    Index n, const Index* indptr, const int* indices, const float* weights, const T* features, Index stride, int width,
    const double* row_scale, const double* item_scale, const double* offset, int groups_log2, double* out)
{
    Lanes lanes(groups_log2);
    for_each_row<E, T>(
        n, {{indptr, indices, weights}, features, stride, width, row_scale, item_scale}, lanes,
        [&](Index user, int column, double value) {
            if (lanes.group == 0)
                out[user * width + column] = value - (offset ? offset[column] : 0.0);
        },
        [](Index) {});
}

/// Squared lengths of the rows of A F - offset, without those of rows that are left to add_parts.
template <typename T, int E>
__global__ void __launch_bounds__(WARPS * WARP, 4) squared_norms(
    Index n, const Index* indptr, const int* indices, const float* weights, const T* features, Index stride, int width,
    const double* row_scale, const double* item_scale, const double* offset, int groups_log2, double* out)
{
    Lanes lanes(groups_log2);
    double length = 0.0;
    for_each_row<E, T>(
        n, {{indptr, indices, weights}, features, stride, width, row_scale, item_scale}, lanes,
        [&](Index, int column, double value) {
            double difference = value - offset[column];
            length = fma(difference, difference, length);
        },
        [&](Index user) {
            length = sum_within(length, lanes);
            if (lanes.lane == 0)
                out[user] = length;
            length = 0.0;
        });
}

/// Squared lengths of the rows of a matrix (n, width), a warp each.
template <typename T>
__global__ void __launch_bounds__(WARPS * WARP) lengths(
    Index n, const T* matrix, Index stride, int width, double* out)
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
        out[row] = length;
}

/// The least of some scores and its label, the first of equals.
struct Nearest {
    static constexpr int NONE = 0x7fffffff;
    int label;
    double score;

    __device__ Nearest() : label(NONE), score(__longlong_as_double(0x7ff0000000000000LL)) {}  // infinity
    __device__ void look(int other, double other_score)
    {
        if (other_score < score || (other_score == score && other < label)) {
            label = other;
            score = other_score;
        }
    }
};

/// Nearest centroid of each user by norms[k] - 2 (A table)[user][k], for a table (I, clusters), without the users that
/// are left to add_parts. A user whose row_scale is 0 gets label -1 and score 0; one with no number among its scores
/// gets label 0.
template <typename T, int E>
__global__ void __launch_bounds__(WARPS * WARP, 4) assign(
    Index n, const Index* indptr, const int* indices, const float* weights, const T* table, Index stride, int clusters,
    const double* row_scale, const double* item_scale, const double* norms, int groups_log2, int* labels,
    double* least)
{
    Lanes lanes(groups_log2);
    Nearest nearest;
    for_each_row<E, T>(
        n, {{indptr, indices, weights}, table, stride, clusters, row_scale, item_scale}, lanes,
        [&](Index, int column, double value) { nearest.look(column, norms[column] - 2.0 * value); },
        [&](Index user) {
            for (int offset = 1; offset < lanes.width; offset *= 2) {
                int label = __shfl_xor_sync(ALL, nearest.label, offset);
                nearest.look(label, __shfl_xor_sync(ALL, nearest.score, offset));
            }
            if (lanes.lane == 0) {
                bool cold = row_scale[user] == 0.0;
                labels[user] = cold ? -1 : nearest.label == Nearest::NONE ? 0 : nearest.label;
                least[user] = cold ? 0.0 : nearest.score;
            }
            nearest = Nearest();
        });
}

constexpr int ITEMS = 4;   // rows of features for which a lane of `products` holds sums (cuda.py: ITEMS)
constexpr int POINTS = 8;  // points, or clusters, for which a lane of `products` or `table_sums` holds sums

/// (F - offset) P^T, (n, clusters), for points P (clusters, width): a warp takes ITEMS rows of F, which it reads once
/// for POINTS points; as many points are read once for ITEMS rows.
template <typename T, int E>
__global__ void __launch_bounds__(WARPS * WARP, 2) products(
    Index n, const T* features, Index stride, int width, const double* offset, const double* points, int clusters,
    double* out)
{
    Index first = warp_number() * ITEMS;
    Lanes lanes(0);
    for (int start = 0; start < clusters; start += POINTS) {
        double sums[ITEMS][POINTS] = {};
        for (int column = lanes.lane * E; column < width; column += WARP * E) {
            Pack<T, E> packs[ITEMS];
#pragma unroll
            for (int item = 0; item < ITEMS; ++item)
                packs[item] =
                    load_pack<false, T, E>(first + item < n, features + (first + item) * stride + column);
            Pack<double, E> centre = load_pack<false, double, E>(true, offset + column);
            double differences[ITEMS][E];
#pragma unroll
            for (int item = 0; item < ITEMS; ++item)
#pragma unroll
                for (int e = 0; e < E; ++e)
                    differences[item][e] = (double)value(packs[item], e) - value(centre, e);
#pragma unroll
            for (int point = 0; point < POINTS; ++point) {
                Pack<double, E> values = load_pack<false, double, E>(
                    start + point < clusters, points + (Index)(start + point) * width + column);
#pragma unroll
                for (int item = 0; item < ITEMS; ++item)
#pragma unroll
                    for (int e = 0; e < E; ++e)
                        sums[item][point] = fma(differences[item][e], value(values, e), sums[item][point]);
            }
        }
#pragma unroll
        for (int item = 0; item < ITEMS; ++item)
#pragma unroll
            for (int point = 0; point < POINTS; ++point) {
                double sum = sum_within(sums[item][point], lanes);
                if (lanes.lane == 0 && first + item < n && start + point < clusters)
                    out[(first + item) * clusters + start + point] = sum;
            }
    }
}

constexpr int SUMMED_AT_ONCE = 4;  // rows of features that a lane of `table_sums` loads before it uses the first

/// partial[c] = T^T F over the c-th `length` rows, (clusters, width), for T (n, clusters): a warp takes 32 * E columns
/// of them. A row of F counts only where its factor is not 0, whatever it holds.
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

constexpr int TILE = 256;  // interactions that a warp of `label_sums` takes, of however many users (cuda.py: TILE)

/// fixed[item][label] += A[user][item], in units that make whole numbers of it: whole numbers add up to the same
/// whatever the order, so that atomics may bring them in any.
///
/// Tile t, the warp's, is TILE interactions from indptr[0] + t * TILE on, the first of them of user tiles[t]. So no
/// warp waits for a busy user. Users with a negative label are left out.
__global__ void __launch_bounds__(WARPS * WARP) label_sums(
    Index n_tiles, const Index* tiles, Index n, const int* labels, const Index* indptr, const int* indices,
    const float* weights, const double* row_scale, const double* item_scale, int clusters, double per_unit,
    unsigned long long* fixed)
{
    Index tile = warp_number();
    if (tile >= n_tiles)
        return;
    Interactions interactions{indptr, indices, weights};
    int lane = (int)(threadIdx.x % WARP);
    Index from = interactions.start(0) + tile * TILE, to = from + TILE;
    for (Index user = tiles[tile]; user < n && interactions.start(user) < to; ++user) {
        Index first = interactions.start(user), last = interactions.start(user + 1);
        int label = labels[user];
        double share = row_scale[user] * per_unit;
        if (label < 0)
            continue;
        for (Index entry = (first > from ? first : from) + lane; entry < (last < to ? last : to); entry += WARP) {
            int item = __ldg(indices + entry);
            double part = share * interactions.weight(entry) * __ldg(item_scale + item);
            if (part != 0.0)
                atomicAdd(fixed + (Index)item * clusters + label, (unsigned long long)__double2ll_rn(part));
        }
    }
}
