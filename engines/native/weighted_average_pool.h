// WeightedAveragePool: x (clips, nt * t, 1 + nh * h * nw * w, C), CLS first -> (clips, nt * nh * nw, C).
//
// out = sum over a block of softmax(x_cls . x / sqrt(C)) x, each position scored by the CLS of its own frame. Scores
// and weights are FP32. The largest score so far is taken off before each exp, so that no score is too large, and each
// token is read once. A block with a NaN among its tokens or their CLS, or with an infinite score, comes out as NaN
// where the formula gives that.
#pragma once

#include "lanes.h"

namespace liteframe {

struct PoolShape {
    int clips, nt, t, nh, h, nw, w, channels;
    float scale;

    LITEFRAME_INLINE int blocks() const { return nt * nh * nw; }
    LITEFRAME_INLINE int size() const { return t * h * w; }
    LITEFRAME_INLINE long long tokens() const { return 1 + static_cast<long long>(nh) * h * nw * w; }
};

// Of a token and of its frame's CLS, in numbers from where x begins.
struct alignas(16) Offsets {
    long long token, cls;
};

// The tokens of one block, in order of time, row and column.
struct Block {
    int clip, time, row, column;

    LITEFRAME_INLINE Block(const PoolShape& s, unsigned number) {
        column = number % s.nw;
        row = number / s.nw % s.nh;
        time = number / s.nw / s.nh % s.nt;
        clip = number / s.nw / s.nh / s.nt;
    }

    LITEFRAME_INLINE Offsets offsets(const PoolShape& s, int member) const {
        const int frame = time * s.t + member / (s.h * s.w), inside = member % (s.h * s.w);
        const long long y = row * s.h + inside / s.w, x = column * s.w + inside % s.w;
        const long long cls = (static_cast<long long>(clip) * s.nt * s.t + frame) * s.tokens();
        return {(cls + 1 + y * s.nw * s.w + x) * s.channels, cls * s.channels};
    }
};

// Softmax over scores that come in chunks.
struct RunningSoftmax {
    float most, total;

    LITEFRAME_INLINE RunningSoftmax() : most(-infinity()), total(0.0f) {}

    // Takes in a larger score, or not; returns by what earlier sums are to be multiplied.
    LITEFRAME_INLINE float raise(float score) {
        const float before = most;
        if (score > most) most = score;
        const float factor = before == most ? 1.0f : expf(before - most);
        total *= factor;
        return factor;
    }

    // Of a score, relative to the largest so far.
    LITEFRAME_INLINE float weight(float score) const {
        return score == -infinity() ? 0.0f : expf(score - most);
    }

    // What weights are to be multiplied with to sum up to one.
    LITEFRAME_INLINE float share() const { return 1.0f / total; }
};

template <int W>
LITEFRAME_INLINE void scale(float (&values)[W], float factor) {
    LITEFRAME_UNROLL
    for (int c = 0; c < W; c++) values[c] *= factor;
}

// Some channels of N of a block's tokens, kept as they were read. Where fewer are left the last one is there again, with
// a weight of zero: nothing depends on how many, and all are read before any is needed.
template <class T, int W, int N>
struct Chunk {
    Lanes<T, W> tokens[N];

    LITEFRAME_INLINE Chunk(const T* x, const Offsets (&at)[N], int channel) {
        LITEFRAME_UNROLL
        for (int i = 0; i < N; i++) tokens[i] = load<W>(x + at[i].token + channel);
    }

    // What these channels add to the scores, not scaled yet.
    LITEFRAME_INLINE void score(const T* x, const Offsets (&at)[N], int channel, float (&scores)[N]) const {
        LITEFRAME_UNROLL
        for (int i = 0; i < N; i++) {
            const Lanes<T, W> cls = load<W>(x + at[i].cls + channel);
            LITEFRAME_UNROLL
            for (int c = 0; c < W; c++) scores[i] += cls[c] * tokens[i][c];
        }
    }

    LITEFRAME_INLINE void add(const float (&weights)[N], float factor, float (&sums)[W]) const {
        scale(sums, factor);
        LITEFRAME_UNROLL
        for (int i = 0; i < N; i++) {
            LITEFRAME_UNROLL
            for (int c = 0; c < W; c++) sums[c] += weights[i] * tokens[i][c];
        }
    }
};

}  // namespace liteframe
