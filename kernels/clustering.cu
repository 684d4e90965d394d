// Kernels for K-means on the rows of A F, which are never stored. kernels/reference.py defines each of them in a few
// lines of array code. All sums are in float64.

#include "gather.cuh"

/// Computes rows of A F for n users: a warp computes ROWS users, and users with more than RUN interactions are left to
/// add_parts. A null pointer stands for scales that are all 1.
///
/// For each user, `add(user, column, value)` is called once for every column, by some lane of the warp, and then
/// `finish(user)` by every lane.
template <int E, typename T, typename Add, typename Finish>
__device__ __forceinline__ void for_each_row(
    Index n, Interactions interactions, const T* features, Index stride, int width, const double* row_scale,
    const double* item_scale, int groups_log2, Add add, Finish finish)
{
    constexpr int SHARING = WARP / ROWS;  // lanes that read the interactions of one user
    __shared__ Entry<double> staged[WARPS][ROWS * ROOM];
    Index first_user = warp_number() * ROWS;
    if (first_user >= n)
        return;
    Lanes lanes(groups_log2);
    Entry<double>* entries = staged[threadIdx.x / WARP];
    Index own = first_user + lanes.lane / SHARING;
    int own_count = -1;  // -1: there is no such user, or it is left to add_parts
    if (own < n) {
        Index first = interactions.start(own), last = interactions.start(own + 1);
        double share = row_scale ? row_scale[own] : 1.0;
        own_count = share == 0.0 ? 0 : last - first <= RUN ? (int)(last - first) : -1;
        read_ahead<double>(
            entries + lanes.lane / SHARING * ROOM, interactions, first, own_count, lanes.lane % SHARING, SHARING,
            OfFeatures<double>{share, item_scale});
    }
    __syncwarp();
    for (int row = 0; row < ROWS; ++row) {
        int count = __shfl_sync(ALL, own_count, row * SHARING);
        if (count < 0)
            continue;
        for (int start = 0; start < width; start += E * lanes.width) {
            Columns mine(width, start, E, lanes);
            double total[E] = {};
            add_rows<true, T, E, 1, double>(total, features, stride, mine, lanes, entries + row * ROOM, count);
            sum_groups(total, lanes);
#pragma unroll
            for (int e = 0; e < E; ++e)
                if (lanes.group == 0 && mine.first + e < width)
                    add(first_user + row, mine.first + e, total[e]);
        }
        finish(first_user + row);
    }
}

/// A F - offset, (n, width), without the rows that are left to add_parts.
template <typename T, int E>
__global__ void __launch_bounds__(WARPS * WARP, 4) aggregate(
    Index n, const Index* indptr, const int* indices, const float* weights, const T* features, Index stride, int width,
    const double* row_scale, const double* item_scale, const double* offset, int groups_log2, double* out)
{
    for_each_row<E>(
        n, {indptr, indices, weights}, features, stride, width, row_scale, item_scale, groups_log2,
        [&](Index user, int column, double value) {
            out[user * width + column] = value - (offset ? offset[column] : 0.0);
        },
        [](Index) {});
}

/// The least of some scores and its label, the first of equals; label 0 where no score is less than infinity.
struct Nearest {
    int label = 0;
    double score = __longlong_as_double(0x7ff0000000000000LL);  // infinity

    __device__ void look(int other, double other_score)
    {
        if (other_score < score || (other_score == score && other < label)) {
            label = other;
            score = other_score;
        }
    }
};

/// Nearest centroid of each user by norms[k] - 2 (A table)[user][k], for a table (I, clusters), without the users that
/// are left to add_parts. A user whose row_scale is 0 gets label -1 and score 0.
template <typename T, int E>
__global__ void __launch_bounds__(WARPS * WARP, 4) assign(
    Index n, const Index* indptr, const int* indices, const float* weights, const T* table, Index stride, int clusters,
    const double* row_scale, const double* item_scale, const double* norms, int groups_log2, int* labels,
    double* least)
{
    Nearest nearest;
    for_each_row<E>(
        n, {indptr, indices, weights}, table, stride, clusters, row_scale, item_scale, groups_log2,
        [&](Index, int column, double value) { nearest.look(column, norms[column] - 2.0 * value); },
        [&](Index user) {
            for (int offset = 1; offset < WARP; offset *= 2) {
                int label = __shfl_xor_sync(ALL, nearest.label, offset);
                nearest.look(label, __shfl_xor_sync(ALL, nearest.score, offset));
            }
            if (threadIdx.x % WARP == 0) {
                bool cold = row_scale[user] == 0.0;
                labels[user] = cold ? -1 : nearest.label;
                least[user] = cold ? 0.0 : nearest.score;
            }
            nearest = Nearest();
        });
}

constexpr int TILE = 256;  // interactions that a warp of `label_sums` takes, of however many users (cuda.py: TILE)

/// fixed[item][label] += A[user][item], rounded to integers of a small unit: a sum of integers does not depend on the
/// order of its terms, so atomics may add them in any order.
///
/// Each warp processes one tile: TILE interactions from indptr[0] + tile * TILE on, whose first user is tiles[tile]. So
/// no warp has more work for a busy user. Users with a negative label are left out.
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
