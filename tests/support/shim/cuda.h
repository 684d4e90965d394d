// What CUDA C++ supplies, for a build by the host's compiler: enough to run kernels/*.cu on a CPU, slowly.
//
// Blocks are taken one after another, warps of a block likewise; each lane is a fibre that runs until the lanes of its
// warp, or the threads of its block, have to meet. What the hardware would leave undefined is an error: a shuffle
// that some lane of the warp does not come to, or comes to by another way, and a barrier that some thread misses.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr int WARP = 32;
constexpr std::size_t STACK_BYTES = 128 << 10;

enum class State { ready, at_warp, at_block, done };

struct Lane {
    ucontext_t context;
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    bool started = false;
    State state = State::ready;
    const char* meeting = nullptr;
    unsigned meetings = 0;
    uint3 thread;
};

struct Warp {
    std::uint64_t values[2][WARP];  // two sets: a lane may be one meeting ahead of another that has yet to read
};

inline std::vector<Lane> lanes;
inline std::vector<Warp> warps;
inline std::function<void()> body;
inline ucontext_t scheduler;
inline jmp_buf scheduler_place;
inline int current;
inline std::string problem;

// A switch by swapcontext asks the system for the signal mask each time; _longjmp does not, but confuses sanitizers.
#ifdef __SANITIZE_ADDRESS__
inline void leave() { swapcontext(&lanes[current].context, &scheduler); }
inline void enter(Lane& lane) { swapcontext(&scheduler, &lane.context); }
#else
inline void leave()
{
    if (!_setjmp(lanes[current].place))
        _longjmp(scheduler_place, 1);
}
inline void enter(Lane& lane)
{
    if (_setjmp(scheduler_place))
        return;
    if (lane.started)
        _longjmp(lane.place, 1);
    lane.started = true;
    setcontext(&lane.context);
}
#endif

inline void live()  // of a fibre: one block after another
{
    for (;;) {
        body();
        lanes[current].state = State::done;
        leave();
    }
}

inline void meet(State state, const char* name)
{
    lanes[current].state = state;
    lanes[current].meeting = name;
    leave();
}

inline const std::uint64_t* exchange(const char* name, unsigned mask, std::uint64_t value)
{
    if (mask != 0xffffffffu)
        problem = std::string(name) + ": a mask without all lanes";
    Lane& lane = lanes[current];
    std::uint64_t* values = warps[current / WARP].values[lane.meetings++ % 2];
    values[current % WARP] = value;
    meet(State::at_warp, name);
    return values;
}

/// Whether all of some lanes are in a state, and in the same meeting.
inline bool all(int first, int last, State state)
{
    int there = 0;
    for (int lane = first; lane < last; ++lane)
        there += lanes[lane].state == state && lanes[lane].meeting == lanes[first].meeting;
    return there == last - first;
}

inline void release(int first, int last)
{
    for (int lane = first; lane < last; ++lane)
        lanes[lane].state = State::ready;
}

inline bool run_warp(int first, int last)
{
    bool moved = false;
    for (;;) {
        for (current = first; current < last; ++current)
            if (lanes[current].state == State::ready) {
                threadIdx = lanes[current].thread;
                enter(lanes[current]);
                moved = true;
            }
        if (!all(first, last, State::at_warp))
            return moved;
        release(first, last);
    }
}

inline void run_block()
{
    int threads = (int)lanes.size();
    release(0, threads);
    for (;;) {
        bool moved = false;
        int done = 0, waiting = 0;
        for (int first = 0; first < threads; first += WARP)
            moved |= run_warp(first, std::min(first + WARP, threads));
        for (const Lane& lane : lanes) {
            done += lane.state == State::done;
            waiting += lane.state == State::at_block;
        }
        if (done == threads || !problem.empty())
            return;
        if (waiting + done == threads && waiting > 0) {  // threads that have left do not count, as on the device
            for (Lane& lane : lanes)
                if (lane.state == State::at_block)
                    lane.state = State::ready;
        } else if (!moved) {
            problem = "threads wait for others that do not come: block " + std::to_string(blockIdx.x);
            return;
        }
    }
}

inline void run(unsigned grid, unsigned x, unsigned y, std::function<void()> kernel)
{
    body = std::move(kernel);
    gridDim = {grid, 1, 1};
    blockDim = {x, y, 1};
    problem.clear();
    lanes = std::vector<Lane>(x * y);
    warps.resize((x * y + WARP - 1) / WARP);
    for (unsigned number = 0; number < x * y; ++number) {
        Lane& lane = lanes[number];
        lane.thread = {number % x, number / x, 0};
        lane.stack = std::make_unique<char[]>(STACK_BYTES);
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.get();
        lane.context.uc_stack.ss_size = STACK_BYTES;
        makecontext(&lane.context, live, 0);
    }
    for (unsigned block = 0; block < grid && problem.empty(); ++block) {
        blockIdx = {block, 0, 0};
        run_block();
    }
}

// Arguments come as the device's launcher hands them on: a pointer to each. `kinds` says what each is, so that a number
// of the wrong size, or an array of the wrong type, does not pass for what the kernel takes.

template <typename A>
std::string wanted()
{
    if constexpr (!std::is_pointer_v<A>) {
        return std::string("#") + (std::is_integral_v<A> ? "i" : "f") + std::to_string(sizeof(A));
    } else {
        using T = std::remove_cv_t<std::remove_pointer_t<A>>;
        if constexpr (std::is_void_v<T>)
            return "*";
        else if constexpr (std::is_integral_v<T>)
            return "i" + std::to_string(sizeof(T));
        else if constexpr (std::is_floating_point_v<T>)
            return "f" + std::to_string(sizeof(T));
        else
            return "h2";
    }
}

inline bool matches(const std::string& wanted, const std::string& given)
{
    if (wanted[0] == '#' || given[0] == '#')
        return wanted == given;
    return given == "0" || wanted == "*" || wanted == given;
}

template <typename... A, std::size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>)
{
    kernel(*(A*)arguments[I]...);
}

template <typename... A>
const char* launch(
    void (*kernel)(A...), unsigned grid, unsigned x, unsigned y, void** arguments, const char** kinds, int count)
{
    std::vector<std::string> types{wanted<A>()...};
    if ((int)types.size() != count) {
        problem = "takes " + std::to_string(types.size()) + " arguments, not " + std::to_string(count);
        return problem.c_str();
    }
    for (int at = 0; at < count; ++at)
        if (!matches(types[at], kinds[at])) {
            problem = "argument " + std::to_string(at) + " is " + kinds[at] + ", not " + types[at];
            return problem.c_str();
        }
    run(grid, x, y, [=] { call(kernel, arguments, std::index_sequence_for<A...>{}); });
    return problem.c_str();
}

template <typename T>
std::uint64_t bits_of(T value)
{
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <typename To, typename From>
To bits_as(From from)
{
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace shim

template <typename T>
T __shfl_sync(unsigned mask, T value, int source)
{
    return shim::bits_as<T>(shim::exchange("__shfl_sync", mask, shim::bits_of(value))[source % shim::WARP]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes)
{
    int source = (shim::current % shim::WARP) ^ lanes;
    return shim::bits_as<T>(shim::exchange("__shfl_xor_sync", mask, shim::bits_of(value))[source]);
}

inline void __syncthreads() { shim::meet(shim::State::at_block, "__syncthreads"); }
inline void __syncwarp() { shim::exchange("__syncwarp", 0xffffffffu, 0); }

using std::fma;

inline float __uint_as_float(unsigned bits) { return shim::bits_as<float>(bits); }
inline double __longlong_as_double(long long bits) { return shim::bits_as<double>(bits); }
inline double __hiloint2double(int high, int low)
{
    return shim::bits_as<double>((std::uint64_t)(unsigned)high << 32 | (unsigned)low);
}
inline long long __double2ll_rn(double value) { return std::llrint(value); }

template <typename T>
T __ldg(const T* from)
{
    return *from;
}

template <typename T>
void __stcs(T* to, T value)
{
    *to = value;
}

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value)
{
    unsigned long long before = *to;
    *to += value;
    return before;
}

// What kernels/device.cuh has in PTX. A load of n bytes asks for a multiple of n, as the device does.

namespace shim {

template <typename... W>
void load_words(bool wanted, const void* from, W&... words)
{
    if (!wanted)
        return;
    constexpr std::size_t BYTES = (sizeof(W) + ...);
    if ((std::uintptr_t)from % BYTES)
        problem = "a load of " + std::to_string(BYTES) + " bytes at no multiple of them";
    const char* next = (const char*)from;
    ((std::memcpy(&words, next, sizeof words), next += sizeof words), ...);
}

}  // namespace shim

template <bool ONCE>
void load(bool wanted, const void* from, unsigned& a, unsigned& b, unsigned& c, unsigned& d)
{
    shim::load_words(wanted, from, a, b, c, d);
}

template <bool ONCE>
void load(bool wanted, const void* from, unsigned& a, unsigned& b)
{
    shim::load_words(wanted, from, a, b);
}

template <bool ONCE>
void load(bool wanted, const void* from, unsigned& a)
{
    shim::load_words(wanted, from, a);
}

template <bool ONCE>
void load(bool wanted, const void* from, unsigned short& a)
{
    shim::load_words(wanted, from, a);
}

inline float float_of_half(unsigned short bits)
{
    unsigned sign = (unsigned)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00)  // infinity or no number
        return shim::bits_as<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    float value = std::ldexp((float)((rest & 0x3ff) | (rest >= 0x400 ? 0x400 : 0)), (int)(rest < 0x400 ? 1 : rest >> 10) - 25);
    return sign ? -value : value;
}

inline unsigned short half_of_float(float value)
{
    unsigned bits = shim::bits_as<unsigned>(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000)
        return 0x7fff;
    if (rest >= 0x477ff000)  // 65520 and more
        return (unsigned short)(sign | 0x7c00);
    if (rest < 0x38800000)  // less than 2^-14: in units of 2^-24, which is what half a float's bits of 0.5 count
        return (unsigned short)(sign | (shim::bits_as<unsigned>(std::fabs(value) + 0.5f) - 0x3f000000));
    rest -= 0x38000000;
    return (unsigned short)(sign | (rest + 0xfff + (rest >> 13 & 1)) >> 13);
}
