// The host library against plain loops in double precision, over shapes drawn at random and by hand.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "lanes.h"

extern "C" int liteframe_depthwise_temporal_conv(
    int type, const void* x, const void* weight, const void* bias, const void* residual, void* out, int clips,
    int time, int rows, int columns, int channels, int kt, int kh, int kw, int st, int sh, int sw, int threads
);
extern "C" int liteframe_depthwise_temporal_conv_backward(
    int type, const void* x, const void* weight, const void* grad, void* grad_x, float* grad_weight, float* grad_bias,
    int clips, int time, int rows, int columns, int channels, int kt, int kh, int kw, int st, int sh, int sw,
    int threads
);
extern "C" int liteframe_weighted_average_pool(
    int type, const void* x, void* out, int clips, int nt, int t, int nh, int h, int nw, int w, int channels,
    float scale, int threads
);

namespace {

using liteframe::Brain;
using liteframe::Half;

std::mt19937 random_bits(1);
int failures = 0;

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

// Aligned to 16 bytes, as allocators and frameworks align tensors.
template <class T>
struct Tensor {
    explicit Tensor(long long count) : count(count), values(static_cast<T*>(std::aligned_alloc(64, bytes(count)))) {}
    ~Tensor() { std::free(values); }
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;

    static size_t bytes(long long count) { return (count * sizeof(T) + 63) / 64 * 64; }

    void fill(float size) {
        std::normal_distribution<float> normal(0.0f, size);
        for (long long i = 0; i < count; i++) liteframe::from_float(normal(random_bits), values[i]);
    }
    double operator[](long long i) const { return liteframe::to_float(values[i]); }

    long long count;
    T* values;
};

void expect(bool holds, const char* what) {
    if (holds) return;
    std::printf("failed: %s\n", what);
    failures++;
}

template <class T>
constexpr double EPSILON = 0;
template <>
constexpr double EPSILON<float> = 1e-5;
template <>
constexpr double EPSILON<Half> = 1e-3;
template <>
constexpr double EPSILON<Brain> = 8e-3;

constexpr double SMALL = 1e-3;  // beneath it FP16 has fewer digits

// Sums of products in double precision, and of their magnitudes.
struct Sums {
    explicit Sums(long long count) : sums(count), magnitudes(count) {}

    void add(long long i, double value) { sums[i] += value, magnitudes[i] += std::abs(value); }

    template <class Values>
    double differ(const Values& values) const {
        double worst = 0;
        for (size_t i = 0; i < sums.size(); i++) {
            worst = std::fmax(worst, std::abs(values[i] - sums[i]) / std::fmax(magnitudes[i], SMALL));
        }
        return worst;
    }

    std::vector<double> sums, magnitudes;
};

template <class T>
void convolution(int type, int clips, const int (&size)[3], int channels, const int (&k)[3], const int (&s)[3]) {
    long long out_size[3], positions = 1, out_positions = 1, taps = 1;
    for (int i = 0; i < 3; i++) {
        out_size[i] = (size[i] + s[i] - 1) / s[i];
        positions *= size[i], out_positions *= out_size[i], taps *= k[i];
    }
    Tensor<T> x(clips * positions * channels), weight(taps * channels), bias(channels);
    Tensor<T> residual(clips * out_positions * channels), out(residual.count);
    x.fill(1), weight.fill(0.5f), bias.fill(1), residual.fill(1), out.fill(1e6f);
    const int status = liteframe_depthwise_temporal_conv(
        type, x.values, weight.values, bias.values, residual.values, out.values, clips, size[0], size[1], size[2],
        channels, k[0], k[1], k[2], s[0], s[1], s[2], draw(1, 3)
    );
    expect(status == 0, "a convolution's status");
    Tensor<T> grad(out.count), grad_x(x.count);
    grad.fill(1), grad_x.fill(1e6f);
    std::vector<float> grad_weight(weight.count), grad_bias(channels);
    const int status_of_gradients = liteframe_depthwise_temporal_conv_backward(
        type, x.values, weight.values, grad.values, grad_x.values, grad_weight.data(), grad_bias.data(), clips,
        size[0], size[1], size[2], channels, k[0], k[1], k[2], s[0], s[1], s[2], draw(1, 3)
    );
    expect(status_of_gradients == 0, "a convolution's gradients' status");
    Sums of_x(x.count), of_weight(weight.count), of_bias(channels);
    double worst = 0;
    for (long long n = 0; n < out.count; n++) {
        const long long c = n % channels, place = n / channels % out_positions, clip = n / channels / out_positions;
        const long long at[3] = {
            place / (out_size[1] * out_size[2]), place / out_size[2] % out_size[1], place % out_size[2]
        };
        double sum = bias[c] + residual[n], magnitude = std::abs(sum);
        of_bias.add(c, grad[n]);
        for (long long tap = 0; tap < taps; tap++) {
            const long long offset[3] = {tap / (k[1] * k[2]), tap / k[2] % k[1], tap % k[2]};
            long long from = clip;
            bool inside = true;
            for (int i = 0; i < 3; i++) {
                const long long place_of = at[i] * s[i] + offset[i] - k[i] / 2;
                inside = inside && place_of >= 0 && place_of < size[i];
                from = from * size[i] + place_of;
            }
            if (!inside) continue;
            const double product = x[from * channels + c] * weight[c * taps + tap];
            sum += product, magnitude += std::abs(product);
            of_x.add(from * channels + c, grad[n] * weight[c * taps + tap]);
            of_weight.add(c * taps + tap, grad[n] * x[from * channels + c]);
        }
        worst = std::fmax(worst, std::abs(out[n] - sum) / magnitude);
    }
    expect(worst < EPSILON<T>, "a convolution's results");
    expect(of_x.differ(grad_x) < EPSILON<T>, "gradients of a convolution's input");
    expect(of_weight.differ(grad_weight) < EPSILON<float>, "gradients of a convolution's weights");
    expect(of_bias.differ(grad_bias) < EPSILON<float>, "gradients of a convolution's biases");
}

template <class T>
void pooling(int type, int clips, const int (&b)[6], int channels, float size) {
    const long long time = b[0] * b[1], height = b[2] * b[3], width = b[4] * b[5], blocks = b[0] * b[2] * b[4];
    Tensor<T> x(clips * time * (1 + height * width) * channels), out(clips * blocks * channels);
    x.fill(size), out.fill(1e6f);
    const float scale = 1 / std::sqrt(static_cast<float>(channels));
    const int status = liteframe_weighted_average_pool(
        type, x.values, out.values, clips, b[0], b[1], b[2], b[3], b[4], b[5], channels, scale, draw(1, 3)
    );
    expect(status == 0, "a pooling's status");
    double worst = 0;
    for (long long n = 0; n < clips * blocks; n++) {
        const long long clip = n / blocks, i = n / (b[2] * b[4]) % b[0], j = n / b[4] % b[2], k = n % b[4];
        std::vector<double> scores;
        std::vector<long long> tokens;
        double most = -INFINITY, total = 0;
        for (int member = 0; member < b[1] * b[3] * b[5]; member++) {
            const long long frame = clip * time + i * b[1] + member / (b[3] * b[5]);
            const long long y = j * b[3] + member / b[5] % b[3], z = k * b[5] + member % b[5];
            const long long cls = frame * (1 + height * width) * channels;
            tokens.push_back(cls + (1 + y * width + z) * channels);
            double score = 0;
            for (int c = 0; c < channels; c++) score += x[cls + c] * x[tokens.back() + c];
            scores.push_back(score * scale);
            most = std::fmax(most, scores.back());
        }
        for (double& score : scores) total += score = std::exp(score - most);
        for (int c = 0; c < channels; c++) {
            double sum = 0, magnitude = 0;
            for (size_t member = 0; member < scores.size(); member++) {
                const double part = scores[member] / total * x[tokens[member] + c];
                sum += part, magnitude += std::abs(part);
            }
            worst = std::fmax(worst, std::abs(out[n * channels + c] - sum) / magnitude);
        }
    }
    expect(worst < 20 * EPSILON<T>, "a pooling's results");
}

template <class T>
void all(int type) {
    const int channels[] = {1, 7, 8, 24, 40};
    for (int round = 0; round < 40; round++) {
        const int wide = channels[draw(0, 4)];
        convolution<T>(
            type, draw(1, 3), {draw(1, 6), draw(1, 7), draw(1, 7)}, wide,
            {2 * draw(0, 2) + 1, 2 * draw(0, 1) + 1, 2 * draw(0, 1) + 1}, {draw(1, 3), draw(1, 2), draw(1, 3)}
        );
        pooling<T>(type, draw(1, 2), {draw(1, 2), draw(1, 4), draw(1, 3), draw(1, 3), draw(1, 3), draw(1, 3)}, wide, 1);
    }
    convolution<T>(type, 2, {4, 1, 17}, 16, {3, 1, 1}, {1, 1, 1});
    convolution<T>(type, 2, {2, 1, 17}, 16, {3, 1, 1}, {1, 1, 1});
    convolution<T>(type, 2, {4, 6, 8}, 16, {3, 3, 3}, {2, 2, 2});
    convolution<T>(type, 2, {2, 3, 5}, 16, {3, 1, 1}, {2, 1, 1});
    pooling<T>(type, 1, {1, 4, 2, 2, 2, 2}, 64, 40);  // scores of thousands
}

}  // namespace

int main() {
    all<float>(0);
    all<Half>(1);
    all<Brain>(2);
    float one = 1;
    const auto conv = [&](int type, int clips, int kernel, int threads) {
        return liteframe_depthwise_temporal_conv(
            type, &one, &one, &one, nullptr, &one, clips, 1, 1, 1, 1, kernel, 1, 1, 1, 1, 1, threads
        );
    };
    expect(conv(3, 1, 1, 1) == 1, "an unknown type is refused");
    expect(conv(0, 0, 1, 1) == 2, "no clips are refused");
    expect(conv(0, 1, 2, 1) == 3, "an even kernel is refused");
    expect(conv(0, 1, 127, 1) == 3, "a kernel of too many taps is refused");
    expect(conv(0, 1, 1, 0) == 4, "no threads are refused");
    expect(liteframe_weighted_average_pool(0, &one, &one, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1) == 2, "no blocks are refused");
    std::printf("%d failures\n", failures);
    return failures != 0;
}
