// The fused pass: gather a user's item rows, weigh, sum, blend with the centroid, scale, cast, store.
//
// In plain C++, for every user u and column d (kernels/reference.py has the same in array expressions):
//
//     if (row_scale[u] == 0) { out[u][d] = scale * cold[d]; continue; }
//     double local = 0, cluster = 0;
//     for (entry = indptr[u]; entry < indptr[u + 1]; ++entry) {
//         item = indices[entry];
//         w = weights ? weights[entry] : 1;
//         if (item_scale[item] != 0) local += row_scale[u] * w * item_scale[item] * features[item][d];
//         if (item_labels && item_labels[item] >= 0) cluster += mean_scale[u] * w * centroids[item_labels[item]][d];
//     }
//     if (user_labels) cluster = centroids[user_labels[u]][d];
//     out[u][d] = scale * (lam[u] * local + (1 - lam[u]) * cluster);
//
// The steps from this loop to the kernels below:
// 1. A thread per value of the result: the loop above. Each lane reads indices and factors anew.
// 2. A warp per user: a lane per interaction reads index and factors once and hands them round; the 32 lanes read a
//    row together, 16 bytes each.
// 3. Several rows at a time, all loads issued before the first is used (gather.cuh: add_rows): without that a warp
//    waits for one row after another, and memory is idle most of the time.
// 4. Narrow rows leave lanes idle, so groups of lanes take different interactions of the user (gather.cuh: Lanes);
//    a group per user instead would wait for the warp's busiest user.
// 5. Users with more than RUN interactions are split: a warp per part, parts summed in float64 in their order.
//    Nobody waits for them, sums keep their digits, and no float atomics means the same bytes in every run.
// 6. A user of 13 interactions is summed in two loads' time, and its row pointer, scales, items and their scales would
//    come in four more, each waiting for the one before. So a warp takes 8 users: its lanes read all of that for all of
//    them at once, to shared memory (gather.cuh: read_ahead), and then sum one user after another. At D 128 that took
//    the kernel from half of a copy's speed to all of it, on an H200.
// The kernels below are step 6. Tests compare them with kernels/reference.py, on the host (tests/shim) and on a GPU.
//
// Bytes of a user of degree n, D columns of b bytes: n * (D * b + 4, and 4 more if weighted) + D * 4 of the result (2
// in float16) + 28 (row pointer, row_scale, lambda, label). Scales of items (8 each) and centroids are small tables
// that stay in the second-level cache. At D 128, float32, degree 13: 13 * 516 + 512 + 28 = 7248 bytes and 3400
// operations: only bandwidth matters. Little's law asks for some 36 KiB in flight per multiprocessor of an H200 (4.8
// TB/s, 1 us, 132 of them); a warp has 8 loads of 16 bytes per lane in flight, 4 KiB, while it sums, and 24 warps fit.

#include "gather.cuh"

/// Stores E values of a row of the result and bypasses the caches, because no kernel reads them soon.
template <int E>
__device__ __forceinline__ void store(void* out, bool half, Index at, const float* values)
{
    if (!half) {
        float* to = (float*)out + at;
        if constexpr (E >= 4) {
#pragma unroll
            for (int e = 0; e < E; e += 4)
                __stcs((float4*)(to + e), make_float4(values[e], values[e + 1], values[e + 2], values[e + 3]));
        } else if constexpr (E == 2) {
            __stcs((float2*)to, make_float2(values[0], values[1]));
        } else {
            __stcs(to, values[0]);
        }
        return;
    }
    unsigned short* to = (unsigned short*)out + at;
    if constexpr (E == 1) {
        __stcs(to, half_of_float(values[0]));
    } else {
        unsigned pairs[E / 2];
#pragma unroll
        for (int e = 0; e < E; e += 2)
            pairs[e / 2] = half_of_float(values[e]) | (unsigned)half_of_float(values[e + 1]) << 16;
        if constexpr (E == 8)
            __stcs((uint4*)to, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
        else if constexpr (E == 4)
            __stcs((uint2*)to, make_uint2(pairs[0], pairs[1]));
        else
            __stcs((unsigned*)to, pairs[0]);
    }
}

constexpr int COLD = -2;  // the label of a cold user

/// A warp for ROWS users, or half as many where items have labels; users with more than RUN interactions are left to
/// add_parts, unless they are cold.
///
/// `cold` is scaled already. `out` (n, width) is float32, or float16 where `half` says so.
template <typename T, int E, int V>
__global__ void __launch_bounds__(WARPS * WARP, 6) aggregate_blend(
    Index n, const Index* indptr, const int* indices, const float* weights, const T* features, Index stride, int width,
    const double* row_scale, const double* item_scale, const int* user_labels, const double* lam,
    const float* centroids, double scale, const int* item_labels, const double* mean_scale, const float* cold,
    int groups_log2, void* out, int half)
{
    __shared__ Entry<float> staged[WARPS][ROWS * ROOM];
    int users = item_labels ? ROWS / 2 : ROWS, sharing = WARP / users;
    Index first_user = warp_number() * users;
    if (first_user >= n)
        return;
    Lanes lanes(V > 1 ? 0 : groups_log2);
    Interactions interactions{indptr, indices, weights};
    Entry<float>* entries = staged[threadIdx.x / WARP];
    Entry<float>* label_entries = entries + ROWS / 2 * ROOM;

    // each lane: of the user that it shares
    Index user = first_user + lanes.lane / sharing;
    int place = lanes.lane / sharing * ROOM, own = lanes.lane % sharing;
    int count = -1, label = -1;  // interactions, -1 where nothing is to be done; centroid, -1 none, COLD for `cold`
    float base_share = 1.0f;
    if (user < n) {
        Index first = interactions.start(user), last = interactions.start(user + 1);
        double row_share = row_scale[user], local_share = lam[user];
        double cluster_share = scale * (1.0 - local_share);
        if (row_share == 0.0) {
            count = 0;
            label = COLD;
        } else if (last - first <= RUN) {
            count = (int)(last - first);
            label = user_labels ? user_labels[user] : -1;
            base_share = (float)cluster_share;
        }
        read_ahead<float>(
            entries + place, interactions, first, count, own, sharing,
            OfFeatures<float>{scale * local_share * row_share, item_scale});
        if (item_labels && count > 0)
            read_ahead<float>(
                label_entries + place, interactions, first, count, own, sharing,
                OfCentroids<float>{cluster_share * mean_scale[user], item_labels});
    }
    __syncwarp();

    for (int number = 0; number < users; ++number) {
        int its_count = __shfl_sync(ALL, count, number * sharing);
        int its_label = __shfl_sync(ALL, label, number * sharing);
        float its_share = __shfl_sync(ALL, base_share, number * sharing);
        if (its_count < 0)
            continue;
        const float* base = its_label == COLD ? cold : its_label < 0 ? nullptr : centroids + (Index)its_label * width;
        for (int start = 0; start < width; start += V * E * lanes.width) {
            Columns mine(width, start, E, lanes);
            float total[V * E];
#pragma unroll
            for (int v = 0; v < V; ++v) {
                int column = mine.first + v * mine.step;
                bool wanted = base && lanes.group == 0 && column < width;
                Pack<float, E> pack = load_pack<false, float, E>(wanted, base + column);
#pragma unroll
                for (int e = 0; e < E; ++e)
                    total[v * E + e] = its_share * value(pack, e);
            }
            add_rows<true, T, E, V, float>(
                total, features, stride, mine, lanes, entries + number * ROOM, its_count);
            if (item_labels)
                add_rows<false, float, E, V, float>(
                    total, centroids, width, mine, lanes, label_entries + number * ROOM, its_count);
            sum_groups(total, lanes);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                int column = mine.first + v * mine.step;
                if (lanes.group == 0 && column < width)
                    store<E>(out, half != 0, (first_user + number) * width + column, total + v * E);
            }
        }
    }
}

/// Finds the users with more than RUN interactions who are not cold: found[0] is their count, and from found[2] on are
/// the number and the degree of each, in any order.
__global__ void __launch_bounds__(WARPS * WARP) busy_rows(
    Index n, const Index* indptr, const double* row_scale, Index* found)
{
    Index user = (Index)blockIdx.x * blockDim.x + threadIdx.x;
    if (user >= n)
        return;
    Index degree = indptr[user + 1] - indptr[user];
    if (degree <= RUN || (row_scale && row_scale[user] == 0.0))
        return;
    unsigned long long number = atomicAdd((unsigned long long*)found, 1ull) + 1;
    found[2 * number] = user;
    found[2 * number + 1] = degree;
}

constexpr int PART = 256;  // interactions of a part of a busy user; its last part may have fewer (cuda.py: PART)

/// Sums the parts of busy users into partial (parts, width), a warp per part. The parts of user at[b] begin with part
/// starts[b], and part p belongs to user at[owner[p]]. RUN interactions are summed in `Sum`, and these sums in float64.
///
/// Without lambda the sum is A F; with lambda, it is the part of the blend that is summed over the items.
template <typename T, int E, typename Sum>
__global__ void __launch_bounds__(WARPS * WARP, sizeof(Sum) == 4 ? 4 : 3) add_parts(
    Index parts, const Index* at, const Index* starts, const Index* owner, const Index* indptr, const int* indices,
    const float* weights, const T* features, Index stride, int width, const double* row_scale,
    const double* item_scale, const double* lam, const float* centroids, double scale, const int* item_labels,
    const double* mean_scale, int groups_log2, double* partial)
{
    Index part = warp_number();
    if (part >= parts)
        return;
    Index busy = owner[part], user = at[busy];
    Interactions interactions{indptr, indices, weights};
    Index from = interactions.start(user) + (part - starts[busy]) * PART, to = interactions.start(user + 1);
    int length = to - from < PART ? (int)(to - from) : PART;
    double share = (lam ? scale * lam[user] : 1.0) * (row_scale ? row_scale[user] : 1.0);
    double mean_share = item_labels ? scale * (1.0 - lam[user]) * mean_scale[user] : 0.0;

    __shared__ Entry<Sum> staged[WARPS][2 * RUN];
    Entry<Sum>* entries = staged[threadIdx.x / WARP];
    Lanes lanes(groups_log2);
    for (int start = 0; start < width; start += E * lanes.width) {
        Columns mine(width, start, E, lanes);
        double whole[E] = {};
        for (int run = 0; run < length; run += RUN) {
            int count = length - run < RUN ? length - run : RUN;
            __syncwarp();
            read_ahead<Sum>(
                entries, interactions, from + run, count, lanes.lane, WARP, OfFeatures<Sum>{share, item_scale});
            if (item_labels)
                read_ahead<Sum>(
                    entries + RUN, interactions, from + run, count, lanes.lane, WARP,
                    OfCentroids<Sum>{mean_share, item_labels});
            __syncwarp();
            Sum total[E] = {};
            add_rows<true, T, E, 1, Sum>(total, features, stride, mine, lanes, entries, count);
            if (item_labels)
                add_rows<false, float, E, 1, Sum>(total, centroids, width, mine, lanes, entries + RUN, count);
            sum_groups(total, lanes);
#pragma unroll
            for (int e = 0; e < E; ++e)
                whole[e] += (double)total[e];
        }
#pragma unroll
        for (int e = 0; e < E; ++e)
            if (lanes.group == 0 && mine.first + e < width)
                partial[part * width + mine.first + e] = whole[e];
    }
}

constexpr int COMBINED_COLUMNS = 32, COMBINED_ROWS = 8;  // threads of a block of combine_parts

template <typename Out>
__device__ __forceinline__ void put(Out* out, double value)
{
    if constexpr (sizeof(Out) == 2)
        out->bits = half_of_float((float)value);
    else
        *out = (Out)value;
}

/// Adds the parts of busy users: parts starts[b] to starts[b + 1] make row b of out, the row of user at[b].
///
/// A block of 32 x 8 threads per user and 32 columns; thread row y sums every eighth part, and these 8 are added in
/// order. With labels, the share of the user's centroid is added; with an offset, that point is subtracted.
template <typename Out>
__global__ void __launch_bounds__(256) combine_parts(
    Index tiles, const Index* at, const Index* starts, const double* partial, int width, const int* user_labels,
    const double* lam, const float* centroids, double scale, const double* offset, Out* out)
{
    __shared__ double sums[COMBINED_ROWS][COMBINED_COLUMNS];
    Index busy = blockIdx.x / tiles;
    Index column = blockIdx.x % tiles * COMBINED_COLUMNS + threadIdx.x;
    double sum = 0.0;
    if (column < width)
        for (Index part = starts[busy] + threadIdx.y; part < starts[busy + 1]; part += COMBINED_ROWS)
            sum += partial[part * width + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= width)
        return;
#pragma unroll
    for (int other = 1; other < COMBINED_ROWS; ++other)
        sum += sums[other][threadIdx.x];
    Index user = at[busy];
    if (user_labels && user_labels[user] >= 0)
        sum += scale * (1.0 - lam[user]) * centroids[(Index)user_labels[user] * width + column];
    if (offset)
        sum -= offset[column];
    put(out + busy * width + column, sum);
}
