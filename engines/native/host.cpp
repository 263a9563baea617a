// The kernels' arithmetic on a CPU: a library that tests compare, and that needs nothing but C++17 and threads.
//
// The functions return 0, or what of the arguments they can't do:
//     1: an unknown type; 2: a size below 1; 3: an even kernel, or more taps than MOST_TAPS; 4: no threads
// Types are 0 for FP32, 1 for FP16, 2 for BF16. Tensors lie as they do for the kernels.

#include <thread>
#include <type_traits>
#include <vector>

#include "depthwise_temporal_conv.h"
#include "weighted_average_pool.h"

namespace liteframe {
namespace {

enum Status { OK, UNKNOWN_TYPE, BAD_SIZE, BAD_KERNEL, NO_THREADS };

// Calls work(first, last) for parts of 0 to count, each on a thread of its own.
template <class Work>
void in_parallel(long long count, int threads, const Work& work) {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(work, count * i / threads, count * (i + 1) / threads);
    work(0, count / threads);
    for (std::thread& other : others) other.join();
}

// -- DepthwiseTemporalConv: each thread some columns of the output

template <class F, int W, class T>
void convolve_columns(
    const ConvShape& s, const T* x, const float* taps, const float* bias, const T* residual, T* out, long long first,
    long long last
) {
    for (long long n = first; n < last; n++) {
        const int clip = static_cast<int>(n / s.positions()), position = static_cast<int>(n % s.positions());
        for (int channel = 0; channel < s.channels; channel += W) {
            const Column at{clip, position / s.columns.out(), position % s.columns.out(), channel};
            F::template convolve<W>(s, x, Taps{taps + channel, s.channels, 4, bias + channel}, residual, out, at);
        }
    }
}

template <class F, int W, class T>
bool convolve_if(
    bool fits, const ConvShape& s, const T* x, const std::vector<float>& taps, const std::vector<float>& bias,
    const T* residual, T* out, int threads
) {
    if (!fits || s.channels % W) return false;
    in_parallel(static_cast<long long>(s.clips) * s.positions(), threads, [&](long long first, long long last) {
        convolve_columns<F, W>(s, x, taps.data(), bias.data(), residual, out, first, last);
    });
    return true;
}

// Taps as the arithmetic reads them: FP32, channels next to each other.
template <class T>
std::vector<float> rearranged(const ConvShape& s, const T* weight) {
    std::vector<float> taps(static_cast<size_t>(s.taps()) * s.channels);
    for (int c = 0; c < s.channels; c++) {
        for (int k = 0; k < s.taps(); k++) {
            taps[static_cast<size_t>(k) * s.channels + c] = to_float(weight[static_cast<size_t>(c) * s.taps() + k]);
        }
    }
    return taps;
}

template <class T>
void convolve(const ConvShape& s, const T* x, const T* weight, const T* bias, const T* residual, T* out, int threads) {
    const std::vector<float> taps = rearranged(s, weight);
    std::vector<float> biases(s.channels);
    for (int c = 0; c < s.channels; c++) biases[c] = to_float(bias[c]);
    const bool done =
        convolve_if<TemporalOf4, 8>(TemporalOf4::fits(s), s, x, taps, biases, residual, out, threads) ||
        convolve_if<TemporalOf2, 8>(TemporalOf2::fits(s), s, x, taps, biases, residual, out, threads) ||
        convolve_if<Strided222, 8>(Strided222::fits(s), s, x, taps, biases, residual, out, threads) ||
        convolve_if<Strided211, 8>(Strided211::fits(s), s, x, taps, biases, residual, out, threads) ||
        convolve_if<AnyForm, 8>(true, s, x, taps, biases, residual, out, threads) ||
        convolve_if<AnyForm, 1>(true, s, x, taps, biases, residual, out, threads);
    static_cast<void>(done);
}

template <int W, class T>
void gather_columns(const ConvShape& s, const T* grad, const float* taps, T* out, long long first, long long last) {
    const int positions = s.rows.size * s.columns.size;
    for (long long n = first; n < last; n++) {
        const int clip = static_cast<int>(n / positions), position = static_cast<int>(n % positions);
        for (int channel = 0; channel < s.channels; channel += W) {
            const Column at{clip, position / s.columns.size, position % s.columns.size, channel};
            gather_input_gradient<W>(s, grad, Taps{taps + channel, s.channels, 4, nullptr}, out, at);
        }
    }
}

// Of the taps and biases of some channels, W at a time.
template <int W, class T>
void sum_weight_gradients(
    const ConvShape& s, const T* x, const T* grad, float* weights, float* biases, long long first, long long last
) {
    for (int channel = static_cast<int>(first) * W; channel < last * W; channel += W) {
        for (int tap = 0; tap < s.taps(); tap++) {
            const int area = s.rows.kernel * s.columns.kernel;
            const Place place{tap / area, tap / s.columns.kernel % s.rows.kernel, tap % s.columns.kernel};
            float sums[1][W] = {}, bias[W] = {};
            for (int clip = 0; clip < s.clips; clip++) {
                for (int n = 0; n < s.positions(); n++) {
                    const Column at{clip, n / s.columns.out(), n % s.columns.out(), channel};
                    add_weight_gradient<1, W>(s, x, grad, place, at, sums, bias);
                }
            }
            for (int c = 0; c < W; c++) {
                weights[static_cast<size_t>(channel + c) * s.taps() + tap] = sums[0][c];
                biases[channel + c] = bias[c];
            }
        }
    }
}

template <class T>
void convolve_backward(
    const ConvShape& s, const T* x, const T* weight, const T* grad, T* out, float* weights, float* biases, int threads
) {
    const std::vector<float> taps = rearranged(s, weight);
    const bool wide = s.channels % 8 == 0;
    in_parallel(
        static_cast<long long>(s.clips) * s.rows.size * s.columns.size, threads,
        [&](long long first, long long last) {
            wide ? gather_columns<8>(s, grad, taps.data(), out, first, last)
                 : gather_columns<1>(s, grad, taps.data(), out, first, last);
        }
    );
    in_parallel(wide ? s.channels / 8 : s.channels, threads, [&](long long first, long long last) {
        wide ? sum_weight_gradients<8>(s, x, grad, weights, biases, first, last)
             : sum_weight_gradients<1>(s, x, grad, weights, biases, first, last);
    });
}

// -- WeightedAveragePool: each thread some blocks

constexpr int CHUNK = 16;  // tokens, as on the device

template <int W, class T>
void pool_blocks(const PoolShape& s, const T* x, T* out, long long first, long long last) {
    std::vector<float> sums(s.channels);
    for (long long n = first; n < last; n++) {
        const Block block(s, static_cast<unsigned>(n));
        RunningSoftmax softmax;
        sums.assign(s.channels, 0.0f);
        for (int begin = 0; begin < s.size(); begin += CHUNK) {
            const int count = s.size() - begin < CHUNK ? s.size() - begin : CHUNK;
            Offsets at[CHUNK];
            for (int i = 0; i < CHUNK; i++) at[i] = block.offsets(s, begin + (i < count ? i : count - 1));
            float scores[CHUNK] = {}, largest = -infinity();
            for (int channel = 0; channel < s.channels; channel += W)
                Chunk<T, W, CHUNK>(x, at, channel).score(x, at, channel, scores);
            for (int i = 0; i < CHUNK; i++) {
                scores[i] *= s.scale;
                if (scores[i] > largest) largest = scores[i];
            }
            const float factor = softmax.raise(largest);
            for (int i = 0; i < CHUNK; i++) {
                scores[i] = i < count ? softmax.weight(scores[i]) : 0.0f;
                softmax.total += scores[i];
            }
            for (int channel = 0; channel < s.channels; channel += W) {
                float(&sum)[W] = *reinterpret_cast<float(*)[W]>(&sums[channel]);
                Chunk<T, W, CHUNK>(x, at, channel).add(scores, factor, sum);
            }
        }
        for (int c = 0; c < s.channels; c++) from_float(sums[c] * softmax.share(), out[n * s.channels + c]);
    }
}

template <class T>
void pool(const PoolShape& s, const T* x, T* out, int threads) {
    in_parallel(static_cast<long long>(s.clips) * s.blocks(), threads, [&](long long first, long long last) {
        s.channels % 8 ? pool_blocks<1>(s, x, out, first, last) : pool_blocks<8>(s, x, out, first, last);
    });
}

Status check(const ConvShape& s, int threads) {
    long long taps = 1;
    for (const Axis& axis : {s.time, s.rows, s.columns}) {
        if (axis.size < 1 || axis.stride < 1) return BAD_SIZE;
        if (axis.kernel < 1 || axis.kernel % 2 == 0 || axis.kernel > MOST_TAPS) return BAD_KERNEL;
        taps *= axis.kernel;
    }
    if (s.clips < 1 || s.channels < 1) return BAD_SIZE;
    if (taps > MOST_TAPS) return BAD_KERNEL;
    return threads < 1 ? NO_THREADS : OK;
}

// Calls run(T*) with the type's T.
template <class Run>
Status of_type(int type, const Run& run) {
    switch (type) {
        case 0: run(static_cast<float*>(nullptr)); return OK;
        case 1: run(static_cast<Half*>(nullptr)); return OK;
        case 2: run(static_cast<Brain*>(nullptr)); return OK;
        default: return UNKNOWN_TYPE;
    }
}

}  // namespace
}  // namespace liteframe

#define CONV_SHAPE                                                                                                 \
    int clips, int time, int rows, int columns, int channels, int kt, int kh, int kw, int st, int sh, int sw

extern "C" int liteframe_depthwise_temporal_conv(
    int type, const void* x, const void* weight, const void* bias, const void* residual, void* out, CONV_SHAPE,
    int threads
) {
    using namespace liteframe;
    const ConvShape shape{clips, {time, kt, st}, {rows, kh, sh}, {columns, kw, sw}, channels};
    if (const Status status = check(shape, threads)) return status;
    return of_type(type, [&](auto* example) {
        using T = std::remove_pointer_t<decltype(example)>;
        const auto as = [](const void* values) { return static_cast<const T*>(values); };
        convolve(shape, as(x), as(weight), as(bias), as(residual), static_cast<T*>(out), threads);
    });
}

// grad is of the output; grad_x gets the type of x, grad_weight and grad_bias are FP32.
extern "C" int liteframe_depthwise_temporal_conv_backward(
    int type, const void* x, const void* weight, const void* grad, void* grad_x, float* grad_weight, float* grad_bias,
    CONV_SHAPE, int threads
) {
    using namespace liteframe;
    const ConvShape shape{clips, {time, kt, st}, {rows, kh, sh}, {columns, kw, sw}, channels};
    if (const Status status = check(shape, threads)) return status;
    return of_type(type, [&](auto* example) {
        using T = std::remove_pointer_t<decltype(example)>;
        const auto as = [](const void* values) { return static_cast<const T*>(values); };
        convolve_backward(
            shape, as(x), as(weight), as(grad), static_cast<T*>(grad_x), grad_weight, grad_bias, threads
        );
    });
}

extern "C" int liteframe_weighted_average_pool(
    int type, const void* x, void* out, int clips, int nt, int t, int nh, int h, int nw, int w, int channels,
    float scale, int threads
) {
    using namespace liteframe;
    for (int size : {clips, nt, t, nh, h, nw, w, channels}) {
        if (size < 1) return BAD_SIZE;
    }
    if (threads < 1) return NO_THREADS;
    return of_type(type, [&](auto* example) {
        using T = std::remove_pointer_t<decltype(example)>;
        pool({clips, nt, t, nh, h, nw, w, channels, scale}, static_cast<const T*>(x), static_cast<T*>(out), threads);
    });
}
