// DepthwiseTemporalConv on tokens as they lie: x (clips, T, rows * columns, C) -> (clips, T', rows' * columns', C).
//
// Cross-correlation with zero padding of (k - 1) / 2 at both ends of every axis. Weights are (C, 1, kt, kh, kw); a grid
// of one axis is one row. A residual is added if there is one. NaNs and infinities spread to what they reach, as in any
// convolution.
#pragma once

#include "lanes.h"

namespace liteframe {

constexpr int MOST_TAPS = 125;  // of a kernel: 5 x 5 x 5

struct Axis {
    int size, kernel, stride;

    LITEFRAME_INLINE int pad() const { return kernel / 2; }
    LITEFRAME_INLINE int out() const { return (size + stride - 1) / stride; }

    // The output that a tap takes this position to; negative if there is none.
    LITEFRAME_INLINE int reached(int position, int tap) const {
        const int from = position + pad() - tap;
        return from >= 0 && from % stride == 0 && from / stride < out() ? from / stride : -1;
    }
};

struct ConvShape {
    int clips;
    Axis time, rows, columns;
    int channels;

    LITEFRAME_INLINE int taps() const { return time.kernel * rows.kernel * columns.kernel; }
    LITEFRAME_INLINE int positions() const { return rows.out() * columns.out(); }
};

// Where one thread works: a column of the output, of some channels, at all times.
struct Column {
    int clip, row, column, channel;
};

// Weights and biases in FP32: tap k of the channels at `taps + k * next_tap`, four of them together.
struct Taps {
    const float* taps;
    int next_tap, next_four;
    const float* bias;

    LITEFRAME_INLINE float of(const float* tap, int channel) const { return tap[channel / 4 * next_four + channel % 4]; }
};

// Adds the residual, if there is one.
template <int W, class T>
LITEFRAME_INLINE void write(float (&sums)[W], const T* residual, T* out, long long place) {
    if (residual) {
        const Lanes<T, W> more = load<W>(residual + place);
        LITEFRAME_UNROLL
        for (int c = 0; c < W; c++) sums[c] += more[c];
    }
    store(out + place, sums);
}

// A form of which all but the grid is known when compiled, so that loops over taps and time steps unroll.
template <int TIME, int KT, int KH, int KW, int ST, int SH, int SW>
struct Form {
    static constexpr int steps = (TIME + ST - 1) / ST, most_taps = KT * KH * KW;

    static LITEFRAME_INLINE int taps(const ConvShape&) { return most_taps; }

    static LITEFRAME_INLINE bool fits(const ConvShape& s) {
        return s.time.size == TIME && s.time.kernel == KT && s.time.stride == ST && s.rows.kernel == KH &&
               s.rows.stride == SH && s.columns.kernel == KW && s.columns.stride == SW;
    }

    // Reads each time step once for all outputs that it reaches.
    template <int W, class T>
    static LITEFRAME_INLINE void convolve(
        const ConvShape& s, const T* x, const Taps& weights, const T* residual, T* out, const Column& at
    ) {
        const long long frame = static_cast<long long>(s.rows.size) * s.columns.size * s.channels;
        const long long out_frame = static_cast<long long>(s.positions()) * s.channels;
        const int first_row = at.row * SH - KH / 2, first_column = at.column * SW - KW / 2;
        const long long line = static_cast<long long>(s.columns.size) * s.channels;
        const T* from[TIME];  // where the taps begin, in each frame; counted on, not computed anew, for each tap
        from[0] = x + at.clip * TIME * frame + first_row * line + first_column * static_cast<long long>(s.channels) +
            at.channel;
        LITEFRAME_UNROLL
        for (int t = 1; t < TIME; t++) from[t] = from[t - 1] + frame;
        float sums[steps][W];
        LITEFRAME_UNROLL
        for (int t = 0; t < steps; t++) {
            LITEFRAME_UNROLL
            for (int c = 0; c < W; c++) sums[t][c] = weights.of(weights.bias, c);
        }
        LITEFRAME_UNROLL
        for (int i = 0; i < KH; i++) {
            Lanes<T, W> read[KW][TIME] = {};  // all of a row's before any is needed
            bool inside[KW];
            const bool row_inside = KH == 1 || (first_row + i >= 0 && first_row + i < s.rows.size);
            LITEFRAME_UNROLL
            for (int j = 0; j < KW; j++) {
                inside[j] = KW == 1 || (first_column + j >= 0 && first_column + j < s.columns.size);
                LITEFRAME_UNROLL
                for (int t = 0; t < TIME; t++) {
                    if (row_inside && inside[j]) read[j][t] = load<W>(from[t] + j * s.channels);
                }
            }
            LITEFRAME_UNROLL
            for (int t = 0; t < TIME; t++) from[t] += line;
            if (!row_inside) continue;
            LITEFRAME_UNROLL
            for (int j = 0; j < KW; j++) {
                if (!inside[j]) continue;
                LITEFRAME_UNROLL
                for (int k = 0; k < KT; k++) {
                    const float* const tap = weights.taps + ((k * KH + i) * KW + j) * weights.next_tap;
                    LITEFRAME_UNROLL
                    for (int t = 0; t < steps; t++) {
                        const int source = t * ST + k - KT / 2;
                        if (source < 0 || source >= TIME) continue;
                        LITEFRAME_UNROLL
                        for (int c = 0; c < W; c++) sums[t][c] += read[j][source][c] * weights.of(tap, c);
                    }
                }
            }
        }
        const long long place = at.clip * steps * out_frame +
            (static_cast<long long>(at.row) * s.columns.out() + at.column) * s.channels + at.channel;
        LITEFRAME_UNROLL
        for (int t = 0; t < steps; t++) write(sums[t], residual, out, place + t * out_frame);
    }
};

// Any form, one time step after the other.
struct AnyForm {
    static constexpr int most_taps = MOST_TAPS;

    static LITEFRAME_INLINE int taps(const ConvShape& s) { return s.taps(); }

    template <int W, class T>
    static LITEFRAME_INLINE void convolve(
        const ConvShape& s, const T* x, const Taps& weights, const T* residual, T* out, const Column& at
    ) {
        const long long frame = static_cast<long long>(s.rows.size) * s.columns.size * s.channels;
        const T* const from = x + at.clip * s.time.size * frame + at.channel;
        for (int step = 0; step < s.time.out(); step++) {
            float sums[W];
            LITEFRAME_UNROLL
            for (int c = 0; c < W; c++) sums[c] = weights.of(weights.bias, c);
            const float* tap = weights.taps;
            for (int k = 0; k < s.time.kernel; k++) {
                for (int i = 0; i < s.rows.kernel; i++) {
                    for (int j = 0; j < s.columns.kernel; j++, tap += weights.next_tap) {
                        const int t = step * s.time.stride + k - s.time.pad();
                        const int row = at.row * s.rows.stride + i - s.rows.pad();
                        const int column = at.column * s.columns.stride + j - s.columns.pad();
                        if (t < 0 || t >= s.time.size || row < 0 || row >= s.rows.size || column < 0 ||
                            column >= s.columns.size)
                            continue;
                        const Lanes<T, W> read = load<W>(
                            from + t * frame + (static_cast<long long>(row) * s.columns.size + column) * s.channels
                        );
                        LITEFRAME_UNROLL
                        for (int c = 0; c < W; c++) sums[c] += read[c] * weights.of(tap, c);
                    }
                }
            }
            const long long position = (static_cast<long long>(at.clip) * s.time.out() + step) * s.positions() +
                at.row * s.columns.out() + at.column;
            write(sums, residual, out, position * s.channels + at.channel);
        }
    }
};

// -- gradients

// Of the input, from that of the output, for a column of the input: each position gathers from the outputs it reached.
template <int W, class T>
LITEFRAME_INLINE void gather_input_gradient(
    const ConvShape& s, const T* grad, const Taps& weights, T* out, const Column& at
) {
    const long long frame = static_cast<long long>(s.positions()) * s.channels;
    const T* const from = grad + at.clip * s.time.out() * frame + at.channel;
    for (int step = 0; step < s.time.size; step++) {
        float sums[W] = {};
        for (int k = 0; k < s.time.kernel; k++) {
            const int t = s.time.reached(step, k);
            if (t < 0) continue;
            for (int i = 0; i < s.rows.kernel; i++) {
                const int row = s.rows.reached(at.row, i);
                if (row < 0) continue;
                for (int j = 0; j < s.columns.kernel; j++) {
                    const int column = s.columns.reached(at.column, j);
                    if (column < 0) continue;
                    const Lanes<T, W> read = load<W>(
                        from + t * frame + (static_cast<long long>(row) * s.columns.out() + column) * s.channels
                    );
                    const int number = (k * s.rows.kernel + i) * s.columns.kernel + j;
                    const float* const tap = weights.taps + number * weights.next_tap;
                    LITEFRAME_UNROLL
                    for (int c = 0; c < W; c++) sums[c] += read[c] * weights.of(tap, c);
                }
            }
        }
        const long long position =
            ((static_cast<long long>(at.clip) * s.time.size + step) * s.rows.size + at.row) * s.columns.size +
            at.column;
        store(out + position * s.channels + at.channel, sums);
    }
}

// One place of the kernel in height and width, and N of its taps through time.
struct Place {
    int first, row, column;
};

// What a column of the output adds to the gradients of N taps, and to the bias's.
template <int N, int W, class T>
LITEFRAME_INLINE void add_weight_gradient(
    const ConvShape& s, const T* x, const T* grad, const Place& place, const Column& at, float (&taps)[N][W],
    float (&bias)[W]
) {
    const int row = at.row * s.rows.stride + place.row - s.rows.pad();
    const int column = at.column * s.columns.stride + place.column - s.columns.pad();
    const bool inside = row >= 0 && row < s.rows.size && column >= 0 && column < s.columns.size;
    const long long frame = static_cast<long long>(s.rows.size) * s.columns.size * s.channels;
    const long long out_frame = static_cast<long long>(s.positions()) * s.channels;
    const T* const from = x + at.clip * s.time.size * frame +
        (static_cast<long long>(row) * s.columns.size + column) * s.channels + at.channel;
    const T* const grads = grad + at.clip * s.time.out() * out_frame +
        (static_cast<long long>(at.row) * s.columns.out() + at.column) * s.channels + at.channel;
    for (int step = 0; step < s.time.out(); step++) {
        const Lanes<T, W> g = load<W>(grads + step * out_frame);
        LITEFRAME_UNROLL
        for (int c = 0; c < W; c++) bias[c] += g[c];
        LITEFRAME_UNROLL
        for (int k = 0; k < N; k++) {
            const int t = step * s.time.stride + place.first + k - s.time.pad();
            if (!inside || t < 0 || t >= s.time.size) continue;
            const Lanes<T, W> read = load<W>(from + t * frame);
            LITEFRAME_UNROLL
            for (int c = 0; c < W; c++) taps[k][c] += g[c] * read[c];
        }
    }
}

// The student's: temporal convolutions over clips of four frames and of two, and its two strided stages.
using TemporalOf4 = Form<4, 3, 1, 1, 1, 1, 1>;
using TemporalOf2 = Form<2, 3, 1, 1, 1, 1, 1>;
using Strided222 = Form<4, 3, 3, 3, 2, 2, 2>;
using Strided211 = Form<2, 3, 1, 1, 2, 1, 1>;

}  // namespace liteframe
