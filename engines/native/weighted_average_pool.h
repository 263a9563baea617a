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

// The tokens of one block, in order of time, row and column.
struct Block {
    int clip, time, row, column;

    LITEFRAME_INLINE Block(const PoolShape& s, long long number) {
        column = static_cast<int>(number % s.nw);
        row = static_cast<int>(number / s.nw % s.nh);
        time = static_cast<int>(number / s.nw / s.nh % s.nt);
        clip = static_cast<int>(number / s.nw / s.nh / s.nt);
    }

    // Of the frame in which a member is.
    LITEFRAME_INLINE long long cls(const PoolShape& s, int member) const {
        const int frame = time * s.t + member / (s.h * s.w);
        return (static_cast<long long>(clip) * s.nt * s.t + frame) * s.tokens();
    }

    LITEFRAME_INLINE long long token(const PoolShape& s, int member) const {
        const int inside = member % (s.h * s.w);
        const long long y = row * s.h + inside / s.w, x = column * s.w + inside % s.w;
        return cls(s, member) + 1 + y * s.nw * s.w + x;
    }
};

// Softmax over scores that come in chunks.
struct RunningSoftmax {
    float most, total;

    LITEFRAME_INLINE RunningSoftmax() : most(-infinity()), total(0.0f) {}

    // Turns scores into weights, relative to the largest so far; returns by what earlier sums are to be multiplied.
    template <int N>
    LITEFRAME_INLINE float enter(float (&scores)[N], int count) {
        const float before = most;
        LITEFRAME_UNROLL
        for (int i = 0; i < N; i++) {
            if (i < count && scores[i] > most) most = scores[i];
        }
        const float factor = before == most ? 1.0f : expf(before - most);
        total *= factor;
        LITEFRAME_UNROLL
        for (int i = 0; i < N; i++) {
            if (i >= count) continue;
            scores[i] = weight(scores[i]);
            total += scores[i];
        }
        return factor;
    }

    // Of a score, relative to the largest so far.
    LITEFRAME_INLINE float weight(float score) const {
        return score == -infinity() ? 0.0f : expf(score - most);
    }
};

// Some channels of a chunk of a block's tokens, kept as they were read.
template <class T, int W, int N>
struct Chunk {
    Lanes<T, W> tokens[N];

    LITEFRAME_INLINE void read(const PoolShape& s, const T* x, const Block& block, int first, int count, int channel) {
        LITEFRAME_UNROLL
        for (int i = 0; i < N; i++) {
            if (i < count) tokens[i] = load<W>(x + block.token(s, first + i) * s.channels + channel);
        }
    }

    // What these channels add to the scores, not scaled yet.
    LITEFRAME_INLINE void score(
        const PoolShape& s, const T* x, const Block& block, int first, int count, int channel, float (&scores)[N]
    ) const {
        LITEFRAME_UNROLL
        for (int i = 0; i < N; i++) {
            if (i >= count) continue;
            const Lanes<T, W> cls = load<W>(x + block.cls(s, first + i) * s.channels + channel);
            LITEFRAME_UNROLL
            for (int c = 0; c < W; c++) scores[i] += to_float(cls.lane[c]) * to_float(tokens[i].lane[c]);
        }
    }

    LITEFRAME_INLINE void add(const float (&weights)[N], int count, float factor, float (&sums)[W]) const {
        LITEFRAME_UNROLL
        for (int c = 0; c < W; c++) sums[c] *= factor;
        LITEFRAME_UNROLL
        for (int i = 0; i < N; i++) {
            if (i >= count) continue;
            LITEFRAME_UNROLL
            for (int c = 0; c < W; c++) sums[c] += weights[i] * to_float(tokens[i].lane[c]);
        }
    }
};

}  // namespace liteframe
