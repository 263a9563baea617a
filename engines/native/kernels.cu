// The operators' kernels. Entry points have C names, which a driver or a plugin finds in PTX and in machine code:
//
//     depthwise_temporal_conv_FORM_TYPE_LANES(x, weight, bias, clips, time, rows, columns, channels,
//                                             kernel of time, rows, columns; stride of time, rows, columns; out)
//     weighted_average_pool_TYPE(x, clips, nt, t, nh, h, nw, w, channels, bits of scale, out)
//
// FORM is temporal4, temporal2, strided222, strided211 or any; TYPE fp32, fp16 or bf16; LANES 8, where the channels
// divide by 8 and addresses by 16, or 1. Integers have 32 bits and lie between inputs and output, as TensorRT's
// ahead-of-time plugins pass them. `with_residual` entries take a tensor more, behind the bias.

#include "depthwise_temporal_conv.h"
#include "weighted_average_pool.h"

namespace liteframe {

constexpr int THREADS = 256;
constexpr int SLAB = 64;  // channels of a thread block: 128 bytes in FP16, a line of the cache

// -- DepthwiseTemporalConv

template <class F>
struct Staged {
    static constexpr int taps = F::taps;
};

template <>
struct Staged<AnyForm> {
    static constexpr int taps = MOST_TAPS;
};

// A thread block's channels, and the ones of this thread.
template <int W>
struct Slab {
    static constexpr int lanes = SLAB / W, columns = THREADS / lanes;
    const int first = blockIdx.y * SLAB, lane = threadIdx.x % lanes * W, column = threadIdx.x / lanes;
    const int channels;  // of the slab, at most SLAB

    __device__ explicit Slab(const ConvShape& s) : channels(min(SLAB, s.channels - first)) {}
};

// Weights of a slab in FP32, rearranged; ends with all threads in step.
template <class T>
__device__ void stage(const ConvShape& s, int first, int here, const T* weight, float* taps) {
    const int count = s.taps();
    for (int i = threadIdx.x; i < here * count; i += THREADS)
        taps[i % count * SLAB + i / count] = to_float(weight[static_cast<long long>(first) * count + i]);
    __syncthreads();
}

// Calls work(column) for those of a grid of so many columns that are this thread's.
template <int W, class Work>
__device__ void each_column(const Slab<W>& slab, int clips, int rows, int columns, const Work& work) {
    const unsigned positions = rows * columns, all = clips * positions, width = columns;
    for (unsigned n = blockIdx.x * slab.columns + slab.column; n < all; n += gridDim.x * slab.columns) {
        const unsigned position = n % positions;
        work(Column{
            static_cast<int>(n / positions), static_cast<int>(position / width), static_cast<int>(position % width),
            slab.first + slab.lane
        });
    }
}

template <class F, int W, class T>
__device__ void convolve_all(
    const ConvShape& s, const T* x, const T* weight, const T* bias, const T* residual, T* out
) {
    __shared__ float taps[Staged<F>::taps * SLAB], biases[SLAB];
    const Slab<W> slab(s);
    for (int i = threadIdx.x; i < slab.channels; i += THREADS) biases[i] = to_float(bias[slab.first + i]);
    stage(s, slab.first, slab.channels, weight, taps);
    if (slab.lane >= slab.channels) return;
    const Taps weights{taps + slab.lane, SLAB, biases + slab.lane};
    each_column(slab, s.clips, s.rows.out(), s.columns.out(), [&](const Column& at) {
        F::template convolve<W>(s, x, weights, residual, out, at);
    });
}

template <int W, class T>
__device__ void gather_all(const ConvShape& s, const T* grad, const T* weight, T* out) {
    __shared__ float taps[MOST_TAPS * SLAB];
    const Slab<W> slab(s);
    stage(s, slab.first, slab.channels, weight, taps);
    if (slab.lane >= slab.channels) return;
    const Taps weights{taps + slab.lane, SLAB, nullptr};
    each_column(slab, s.clips, s.rows.size, s.columns.size, [&](const Column& at) {
        gather_input_gradient<W>(s, grad, weights, out, at);
    });
}

// What each thread block adds to the gradients: out (blocks, taps + 1, channels), the bias's last. A third index of the
// grid counts places in the kernel, at each of which N taps through time are summed up at once. Blocks are added up
// elsewhere, in a fixed order, so that results repeat.
template <int N, int W, class T>
__device__ void sum_weight_gradient(const ConvShape& s, const T* x, const T* grad, float* out) {
    __shared__ float shared[THREADS / (SLAB / W)][SLAB];
    const Slab<W> slab(s);
    const int area = s.rows.kernel * s.columns.kernel, inside = blockIdx.z % area;
    const Place place{static_cast<int>(blockIdx.z / area * N), inside / s.columns.kernel, inside % s.columns.kernel};
    float taps[N][W] = {}, bias[W] = {};
    if (slab.lane < slab.channels) {
        each_column(slab, s.clips, s.rows.out(), s.columns.out(), [&](const Column& at) {
            add_weight_gradient<N, W>(s, x, grad, place, at, taps, bias);
        });
    }
    float* const to = out + (static_cast<long long>(blockIdx.x) * (s.taps() + 1)) * s.channels + slab.first;
#pragma unroll
    for (int k = 0; k <= N; k++) {
        if (k == N && blockIdx.z) break;  // one place is enough for the bias
        __syncthreads();
#pragma unroll
        for (int c = 0; c < W; c++) shared[slab.column][slab.lane + c] = k < N ? taps[k % N][c] : bias[c];
        __syncthreads();
        for (int c = threadIdx.x; c < slab.channels; c += THREADS) {
            float sum = 0.0f;
            for (int column = 0; column < slab.columns; column++) sum += shared[column][c];
            const int tap = k < N ? (place.first + k) * area + inside : s.taps();
            to[static_cast<long long>(tap) * s.channels + c] = sum;
        }
    }
}

#define CONV_SHAPE                                                                                                  \
    int clips, int time, int rows, int columns, int channels, int kt, int kh, int kw, int st, int sh, int sw
#define SHAPE                                                                                                       \
    liteframe::ConvShape { clips, {time, kt, st}, {rows, kh, sh}, {columns, kw, sw}, channels }
// at least one thread block on a multiprocessor: asked for no more, the compiler takes the registers that it needs
#define ENTRY extern "C" __global__ void __launch_bounds__(liteframe::THREADS, 1)
#define CONV(form, Form, type, T, W)                                                                                \
    ENTRY depthwise_temporal_conv_##form##_##type##_##W(                                                            \
        const T* x, const T* weight, const T* bias, CONV_SHAPE, T* out                                              \
    ) {                                                                                                             \
        liteframe::convolve_all<liteframe::Form, W, T>(SHAPE, x, weight, bias, nullptr, out);                       \
    }
#define CONV_WITH_RESIDUAL(form, Form, type, T, W)                                                                  \
    ENTRY depthwise_temporal_conv_with_residual_##form##_##type##_##W(                                              \
        const T* x, const T* weight, const T* bias, const T* residual, CONV_SHAPE, T* out                           \
    ) {                                                                                                             \
        liteframe::convolve_all<liteframe::Form, W, T>(SHAPE, x, weight, bias, residual, out);                      \
    }
#define INPUT_GRADIENT(type, T, W)                                                                                  \
    ENTRY depthwise_temporal_conv_input_gradient_##type##_##W(const T* grad, const T* weight, CONV_SHAPE, T* out) { \
        liteframe::gather_all<W, T>(SHAPE, grad, weight, out);                                                      \
    }
#define WEIGHT_GRADIENT(N, type, T, W)                                                                              \
    ENTRY depthwise_temporal_conv_weight_gradient##N##_##type##_##W(                                                \
        const T* x, const T* grad, CONV_SHAPE, float* out                                                           \
    ) {                                                                                                             \
        liteframe::sum_weight_gradient<N, W, T>(SHAPE, x, grad, out);                                               \
    }

// -- WeightedAveragePool

[[maybe_unused]] constexpr int CHUNK = 16;  // tokens that are read at once: a whole block at 16x
[[maybe_unused]] constexpr int WARPS = THREADS / 32;  // of a thread block, at most

// Of each score the sum over all threads of the block.
template <int N>
__device__ void sum_up(float (&scores)[N], float (&shared)[N][WARPS]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
        for (int offset = 16; offset; offset /= 2) scores[i] += __shfl_xor_sync(~0u, scores[i], offset);
        if (lane == 0) shared[i][warp] = scores[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) {
        scores[i] = 0.0f;
        for (int w = 0; w < warps; w++) scores[i] += shared[i][w];
    }
    __syncthreads();
}

// A thread block for each block of tokens, a thread for every eight channels, of which there are 8 * THREADS at most:
// what it read stays in its registers.
template <class T>
__device__ void pool(const PoolShape& s, const T* x, T* out) {
    constexpr int W = 8;
    __shared__ float shared[CHUNK][WARPS];
    const Block block(s, blockIdx.x);
    const int channel = threadIdx.x * W;
    const bool active = channel < s.channels;
    RunningSoftmax softmax;
    float sums[W] = {};
    for (int first = 0; first < s.size(); first += CHUNK) {
        const int count = min(CHUNK, s.size() - first);
        Chunk<T, W, CHUNK> chunk;
        float scores[CHUNK] = {};
        if (active) {
            chunk.read(s, x, block, first, count, channel);
            chunk.score(s, x, block, first, count, channel, scores);
        }
        sum_up(scores, shared);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) scores[i] *= s.scale;
        const float factor = softmax.enter(scores, count);
        if (active) chunk.add(scores, count, factor, sums);
    }
    if (!active) return;
#pragma unroll
    for (int c = 0; c < W; c++) sums[c] /= softmax.total;
    store(out + static_cast<long long>(blockIdx.x) * s.channels + channel, sums);
}

// Any number of channels; tokens are read again when they are summed up.
template <class T>
__device__ void pool_any(const PoolShape& s, const T* x, T* out) {
    __shared__ float shared[1][WARPS];
    extern __shared__ float weights[];  // of the block's tokens
    const Block block(s, blockIdx.x);
    RunningSoftmax softmax;
    for (int i = 0; i < s.size(); i++) {
        float score[1] = {0.0f};
        for (int c = threadIdx.x; c < s.channels; c += blockDim.x)
            score[0] += to_float(x[block.cls(s, i) * s.channels + c]) * to_float(x[block.token(s, i) * s.channels + c]);
        sum_up(score, shared);
        score[0] *= s.scale;
        weights[i] = score[0];  // the same from all threads
        softmax.enter(score, 1);
    }
    __syncthreads();
    for (int c = threadIdx.x; c < s.channels; c += blockDim.x) {
        float sum = 0.0f;
        for (int i = 0; i < s.size(); i++)
            sum += softmax.weight(weights[i]) * to_float(x[block.token(s, i) * s.channels + c]);
        sum /= softmax.total;
        from_float(sum, out[static_cast<long long>(blockIdx.x) * s.channels + c]);
    }
}

#define POOL(name, type, T)                                                                                         \
    ENTRY weighted_average_##name##_##type(                                                                         \
        const T* x, int clips, int nt, int t, int nh, int h, int nw, int w, int channels, int scale, T* out         \
    ) {                                                                                                             \
        liteframe::name<T>({clips, nt, t, nh, h, nw, w, channels, __int_as_float(scale)}, x, out);                  \
    }

}  // namespace liteframe

#define FP32 float
#define FP16 liteframe::Half
#define BF16 liteframe::Brain
#define FORMS(ENTRY_OF, type, T, W)                                                                                 \
    ENTRY_OF(temporal4, TemporalOf4, type, T, W)                                                                    \
    ENTRY_OF(temporal2, TemporalOf2, type, T, W)                                                                    \
    ENTRY_OF(strided222, Strided222, type, T, W)                                                                    \
    ENTRY_OF(strided211, Strided211, type, T, W)                                                                    \
    ENTRY_OF(any, AnyForm, type, T, W)                                                                              \
    ENTRY_OF(any, AnyForm, type, T, 1)
#define INFERENCE(type, T, W)                                                                                       \
    FORMS(CONV, type, T, W)                                                                                         \
    POOL(pool, type, T)                                                                                             \
    POOL(pool_any, type, T)
#define TRAINING(type, T, W)                                                                                        \
    FORMS(CONV_WITH_RESIDUAL, type, T, W)                                                                           \
    INPUT_GRADIENT(type, T, W)                                                                                      \
    INPUT_GRADIENT(type, T, 1)                                                                                      \
    WEIGHT_GRADIENT(3, type, T, W)                                                                                  \
    WEIGHT_GRADIENT(3, type, T, 1)                                                                                  \
    WEIGHT_GRADIENT(1, type, T, W)                                                                                  \
    WEIGHT_GRADIENT(1, type, T, 1)
#define OF_ALL_TYPES(ENTRIES)                                                                                       \
    ENTRIES(fp32, FP32, 4)                                                                                          \
    ENTRIES(fp16, FP16, 8)                                                                                          \
    ENTRIES(bf16, BF16, 8)

// Which entries are compiled: all, or those that are asked for, such as one by -DLITEFRAME_ENTRIES=POOL(pool,fp16,FP16)
#ifndef LITEFRAME_ENTRIES
#define LITEFRAME_ENTRIES OF_ALL_TYPES(INFERENCE) OF_ALL_TYPES(TRAINING)
#endif
LITEFRAME_ENTRIES
