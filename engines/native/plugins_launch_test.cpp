// The plugin library launching its kernels, on a CPU by cudart_on_cpu.cpp, against the host library.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "lanes.h"

extern "C" int liteframe_depthwise_temporal_conv(
    int type, const void* x, const void* weight, const void* bias, const void* residual, void* out, int clips,
    int time, int rows, int columns, int channels, int kt, int kh, int kw, int st, int sh, int sw, int threads
);
extern "C" int liteframe_weighted_average_pool(
    int type, const void* x, void* out, int clips, int nt, int t, int nh, int h, int nw, int w, int channels,
    float scale, int threads
);

namespace {

using namespace nvinfer1;
using Ints = std::vector<int32_t>;

int failures = 0;

template <class T>
struct Tensor {
    std::vector<T> values;
    PluginTensorDesc desc{};

    Tensor(DataType type, std::initializer_list<int> sizes) {
        long long count = 1;
        for (int size : sizes) desc.dims.d[desc.dims.nbDims++] = size, count *= size;
        desc.type = type;
        desc.format = TensorFormat::kLINEAR;
        values.resize(count);
    }

    void fill() {
        static std::mt19937 random(1);
        std::normal_distribution<float> normal;
        for (T& value : values) liteframe::from_float(normal(random), value);
    }
};

template <class T>
void compare(const Tensor<T>& found, const Tensor<T>& expected, const char* what, const char* type) {
    float most = 0.0f, error = 0.0f;
    for (size_t i = 0; i < expected.values.size(); i++) {
        const float wanted = liteframe::to_float(expected.values[i]);
        const float difference = std::fabs(liteframe::to_float(found.values[i]) - wanted);
        most = std::fmax(most, std::fabs(wanted));
        error = difference <= 1e30f ? std::fmax(error, difference) : INFINITY;  // NaN, too
    }
    if (error <= 0.01f * most) return;
    std::printf("failed: %s in %s, off by %g of %g\n", what, type, error, most);
    failures++;
}

// What enqueue returned; the output lies poisoned before.
template <class T>
int enqueue(
    IPluginCreatorInterface* creator, const std::vector<std::pair<const char*, Ints>>& attributes,
    const std::vector<const Tensor<T>*>& inputs, Tensor<T>& out
) {
    std::vector<PluginField> fields;
    for (const auto& [name, values] : attributes)
        fields.emplace_back(name, values.data(), PluginFieldType::kINT32, static_cast<int32_t>(values.size()));
    const PluginFieldCollection given{static_cast<int32_t>(fields.size()), fields.data()};
    const std::unique_ptr<IPluginV3> plugin{
        static_cast<IPluginCreatorV3One*>(creator)->createPlugin("node", &given, TensorRTPhase::kRUNTIME)
    };
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    const std::unique_ptr<IPluginV3> attached{runtime->attachToContext(nullptr)};
    runtime = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::vector<PluginTensorDesc> descs;
    std::vector<const void*> pointers;
    for (const Tensor<T>* input : inputs) descs.push_back(input->desc), pointers.push_back(input->values.data());
    for (T& value : out.values) liteframe::from_float(NAN, value);
    void* const outputs[] = {out.values.data()};
    if (runtime->onShapeChange(descs.data(), static_cast<int32_t>(descs.size()), &out.desc, 1) != 0) return -1;
    return runtime->enqueue(descs.data(), &out.desc, pointers.data(), outputs, nullptr, nullptr);
}

struct Convolution {
    const char* name;
    int clips, time, channels;
    Ints grid, kernel, strides;
};

const Convolution CONVOLUTIONS[] = {
    {"the student's, 4 steps", 3, 4, 768, {257}, {3, 1}, {1, 1}},
    {"the student's, 2 steps", 3, 2, 136, {257}, {3, 1}, {1, 1}},
    {"the student's, 1 step", 3, 1, 72, {33}, {3, 1}, {1, 1}},
    {"the student's, strided", 2, 4, 72, {16, 16}, {3, 3, 3}, {2, 2, 2}},
    {"the student's, strided in time", 2, 2, 72, {8, 9}, {3, 1, 1}, {2, 1, 1}},
    {"odd sizes", 2, 5, 24, {7, 9}, {5, 3, 3}, {2, 1, 3}},
    {"odd channels", 2, 4, 77, {33}, {3, 3}, {1, 2}},
};

template <class T>
void convolve(IPluginCreatorInterface* creator, DataType type, int number, const char* type_name) {
    const auto out_size = [](int size, int stride) { return (size + stride - 1) / stride; };
    for (const Convolution& c : CONVOLUTIONS) {
        const bool row = c.grid.size() == 1;
        const int rows = row ? 1 : c.grid[0], columns = c.grid.back(), sh = row ? 1 : c.strides[1];
        const int kh = row ? 1 : c.kernel[1], kw = c.kernel.back(), sw = c.strides.back();
        Tensor<T> x(type, {c.clips, c.time, rows * columns, c.channels}), bias(type, {c.channels});
        Tensor<T> weight = row ? Tensor<T>(type, {c.channels, 1, c.kernel[0], kw})
                               : Tensor<T>(type, {c.channels, 1, c.kernel[0], kh, kw});
        for (Tensor<T>* input : {&x, &weight, &bias}) input->fill();
        const int positions = out_size(rows, sh) * out_size(columns, sw);
        Tensor<T> found(type, {c.clips, out_size(c.time, c.strides[0]), positions, c.channels}), expected = found;
        const int failed = enqueue<T>(
            creator, {{"grid", c.grid}, {"strides", c.strides}}, {&x, &weight, &bias}, found
        );
        if (failed) std::printf("failed: %s is not launched: %d\n", c.name, failed), failures++;
        liteframe_depthwise_temporal_conv(
            number, x.values.data(), weight.values.data(), bias.values.data(), nullptr, expected.values.data(),
            c.clips, c.time, rows, columns, c.channels, c.kernel[0], kh, kw, c.strides[0], sh, sw, 2
        );
        compare(found, expected, c.name, type_name);
    }
}

struct Pooling {
    const char* name;
    int clips, channels;
    Ints blocks;
};

const Pooling POOLINGS[] = {
    {"the teacher's", 2, 1024, {1, 4, 4, 2, 4, 2}},
    {"8x", 2, 768, {2, 2, 4, 2, 4, 2}},
    {"large blocks", 2, 256, {1, 4, 2, 4, 2, 4}},
    {"odd channels", 2, 77, {1, 4, 3, 2, 2, 3}},
    {"many channels", 1, 3200, {1, 2, 2, 2, 2, 2}},
};

template <class T>
void pool(IPluginCreatorInterface* creator, DataType type, int number, const char* type_name) {
    for (const Pooling& p : POOLINGS) {
        const Ints& b = p.blocks;
        Tensor<T> x(type, {p.clips, b[0] * b[1], 1 + b[2] * b[3] * b[4] * b[5], p.channels});
        x.fill();
        Tensor<T> found(type, {p.clips, b[0] * b[2] * b[4], p.channels}), expected = found;
        const int failed = enqueue<T>(creator, {{"blocks", b}}, {&x}, found);
        if (failed) std::printf("failed: %s is not launched: %d\n", p.name, failed), failures++;
        liteframe_weighted_average_pool(
            number, x.values.data(), expected.values.data(), p.clips, b[0], b[1], b[2], b[3], b[4], b[5], p.channels,
            1.0f / std::sqrt(static_cast<float>(p.channels)), 2
        );
        compare(found, expected, p.name, type_name);
    }
}

}  // namespace

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) return std::printf("%s\n", dlerror()), 1;
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    const auto get_creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = get_creators(count);
    convolve<float>(creators[0], DataType::kFLOAT, 0, "FP32");
    convolve<liteframe::Half>(creators[0], DataType::kHALF, 1, "FP16");
    convolve<liteframe::Brain>(creators[0], DataType::kBF16, 2, "BF16");
    pool<float>(creators[1], DataType::kFLOAT, 0, "FP32");
    pool<liteframe::Half>(creators[1], DataType::kHALF, 1, "FP16");
    pool<liteframe::Brain>(creators[1], DataType::kBF16, 2, "BF16");

    // what a kernel can't do is said, not done wrongly
    Tensor<float> x(DataType::kFLOAT, {1, 4, 9, 8}), bias(DataType::kFLOAT, {8}), out = x;
    Tensor<float> large(DataType::kFLOAT, {8, 1, 127, 1}), weight(DataType::kFLOAT, {8, 1, 3, 1});
    const auto launched = [&](const Ints& grid, const Tensor<float>& taps) {
        return enqueue<float>(creators[0], {{"grid", grid}, {"strides", {1, 1}}}, {&x, &taps, &bias}, out) == 0;
    };
    if (!launched({9}, weight) || launched({9}, large) || launched({10}, weight))
        std::printf("failed: refusing a convolution\n"), failures++;
    Tensor<float> wide(DataType::kFLOAT, {1, 1, 2, 16384}), pooled(DataType::kFLOAT, {1, 1, 16384});
    if (enqueue<float>(creators[1], {{"blocks", {1, 1, 1, 1, 1, 1}}}, {&wide}, pooled) == 0)
        std::printf("failed: refusing to pool so many channels\n"), failures++;
    Tensor<float> few(DataType::kFLOAT, {1, 4, 17, 8}), four(DataType::kFLOAT, {1, 4, 8});
    if (enqueue<float>(creators[1], {{"blocks", {1, 4, 2, 2, 2, 2}}}, {&few}, four) != 0 ||
        enqueue<float>(creators[1], {{"blocks", {1, 4, 2, 2, 2, 3}}}, {&few}, four) == 0)
        std::printf("failed: refusing blocks of other tokens\n"), failures++;
    std::printf("%d failures\n", failures);
    return failures != 0;
}
