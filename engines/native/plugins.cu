// TensorRT's plugins of the two operators, for TensorRT 10.3 and later: a library that IPluginRegistry::loadLibrary,
// polygraphy --plugins and trtexec --dynamicPlugins load. Names, version and namespace are those of the ONNX nodes.

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#define LITEFRAME_ENTRIES OF_ALL_TYPES(INFERENCE)
#include "kernels.cu"

namespace liteframe {
namespace {

using namespace nvinfer1;

constexpr char NAMESPACE[] = "liteframe", VERSION[] = "1";
constexpr int ROUNDS = 4;  // positions that a thread convolves one after the other
constexpr int LANES = 8;  // of which channels are a multiple, or one is taken at a time
constexpr int MOST_POOLED = 11264;  // channels of which the sums fit a thread block's shared memory

using Ints = std::vector<int32_t>;

int ceil_div(long long a, long long b) { return static_cast<int>((a + b - 1) / b); }

// An operator's arithmetic on shapes, and its launches. Attributes are lists of integers, in the order of `names`.
struct DepthwiseTemporalConvOp {
    static constexpr char name[] = "DepthwiseTemporalConv";
    static constexpr int inputs = 3;  // x, weight, bias
    static constexpr const char* names[] = {"grid", "strides"};

    static bool valid(const std::vector<Ints>& a) {
        const bool ranks = (a[0].size() == 1 || a[0].size() == 2) && a[1].size() == a[0].size() + 1;
        return ranks && std::all_of(a[0].begin(), a[0].end(), [](int n) { return n > 0; }) &&
               std::all_of(a[1].begin(), a[1].end(), [](int n) { return n > 0; });
    }

    static void shape(const std::vector<Ints>& a, const DimsExprs* in, DimsExprs& out, IExprBuilder& builder) {
        long long positions = 1;
        for (size_t i = 0; i < a[0].size(); i++) positions *= ceil_div(a[0][i], a[1][i + 1]);
        out = in[0];
        out.d[1] = builder.operation(DimensionOperation::kCEIL_DIV, *in[0].d[1], *builder.constant(a[1][0]));
        out.d[2] = builder.constant(positions);
    }

    template <class T, class Kernels>
    static cudaError_t launch(
        const std::vector<Ints>& a, const PluginTensorDesc* desc, const void* const* in, void* out, cudaStream_t stream
    ) {
        const Dims x = desc[0].dims, weight = desc[1].dims;
        const bool row = a[0].size() == 1;  // a grid of one axis is one row
        const int kh = row ? 1 : static_cast<int>(weight.d[3]), kw = static_cast<int>(weight.d[row ? 3 : 4]);
        const ConvShape s{
            static_cast<int>(x.d[0]),
            {static_cast<int>(x.d[1]), static_cast<int>(weight.d[2]), a[1][0]},
            {row ? 1 : a[0][0], kh, row ? 1 : a[1][1]},
            {a[0].back(), kw, a[1].back()},
            static_cast<int>(x.d[3])
        };
        if (s.taps() > MOST_TAPS || s.rows.size * s.columns.size != x.d[2]) return cudaErrorInvalidValue;
        const auto kernel = Kernels::convolution(s);
        const int lanes = s.channels % LANES ? 1 : Kernels::lanes, per_block = THREADS * lanes / SLAB * ROUNDS;
        const int grid =
            ceil_div(static_cast<long long>(s.clips) * s.positions(), per_block) * ceil_div(s.channels, SLAB);
        kernel<<<grid, THREADS, 0, stream>>>(
            static_cast<const T*>(in[0]), static_cast<const T*>(in[1]), static_cast<const T*>(in[2]), s.clips,
            s.time.size, s.rows.size, s.columns.size, s.channels, s.time.kernel, s.rows.kernel, s.columns.kernel,
            s.time.stride, s.rows.stride, s.columns.stride, static_cast<T*>(out)
        );
        return cudaGetLastError();
    }
};

struct WeightedAveragePoolOp {
    static constexpr char name[] = "WeightedAveragePool";
    static constexpr int inputs = 1;
    static constexpr const char* names[] = {"blocks"};

    static bool valid(const std::vector<Ints>& a) {
        return a[0].size() == 6 && std::all_of(a[0].begin(), a[0].end(), [](int n) { return n > 0; });
    }

    static void shape(const std::vector<Ints>& a, const DimsExprs* in, DimsExprs& out, IExprBuilder& builder) {
        out.nbDims = 3;
        out.d[0] = in[0].d[0];
        out.d[1] = builder.constant(a[0][0] * a[0][2] * a[0][4]);
        out.d[2] = in[0].d[3];
    }

    template <class T, class Kernels>
    static cudaError_t launch(
        const std::vector<Ints>& a, const PluginTensorDesc* desc, const void* const* in, void* out, cudaStream_t stream
    ) {
        const Dims x = desc[0].dims;
        const Ints& b = a[0];
        const int channels = static_cast<int>(x.d[3]);
        const long long tokens = 1 + static_cast<long long>(b[2]) * b[3] * b[4] * b[5];
        if (channels > MOST_POOLED || x.d[1] != b[0] * b[1] || x.d[2] != tokens) return cudaErrorInvalidValue;
        const bool wide = channels % LANES == 0, at_once = wide && channels <= Kernels::lanes * THREADS;
        const float scale = 1.0f / std::sqrt(static_cast<float>(channels));
        int bits;
        std::memcpy(&bits, &scale, sizeof bits);
        const auto kernel = at_once ? Kernels::pool : wide ? Kernels::pool_any_wide : Kernels::pool_any;
        const int threads = at_once ? ceil_div(channels, Kernels::lanes * 32) * 32 : THREADS;
        kernel<<<static_cast<unsigned>(x.d[0]) * b[0] * b[2] * b[4], threads, at_once ? 0 : channels * sizeof(float),
                 stream>>>(
            static_cast<const T*>(in[0]), static_cast<int>(x.d[0]), b[0], b[1], b[2], b[3], b[4], b[5], channels,
            bits, static_cast<T*>(out)
        );
        return cudaGetLastError();
    }
};

// The entry points of a type; LANES channels are moved at once, 16 bytes.
#define KERNELS(Name, type, T, LANES_OF)                                                                            \
    struct Name {                                                                                                   \
        static constexpr int lanes = LANES_OF;                                                                      \
        using Convolution = decltype(&depthwise_temporal_conv_any_##type##_1);                                      \
        static Convolution convolution(const ConvShape& s) {                                                        \
            if (s.channels % LANES) return depthwise_temporal_conv_any_##type##_1;                                  \
            if (TemporalOf4::fits(s)) return depthwise_temporal_conv_temporal4_##type##_##LANES_OF;                 \
            if (TemporalOf2::fits(s)) return depthwise_temporal_conv_temporal2_##type##_##LANES_OF;                 \
            if (Strided222::fits(s)) return depthwise_temporal_conv_strided222_##type##_##LANES_OF;                 \
            if (Strided211::fits(s)) return depthwise_temporal_conv_strided211_##type##_##LANES_OF;                 \
            return depthwise_temporal_conv_any_##type##_##LANES_OF;                                                 \
        }                                                                                                           \
        static constexpr auto pool = weighted_average_pool_##type;                                                  \
        static constexpr auto pool_any = weighted_average_pool_any_##type##_1;                                      \
        static constexpr auto pool_any_wide = weighted_average_pool_any_##type##_##LANES_OF;                        \
    };

KERNELS(Fp32, fp32, float, 4)
KERNELS(Fp16, fp16, Half, 8)
KERNELS(Bf16, bf16, Brain, 8)

// Holds nothing but the attributes, so that one plugin may serve several contexts and streams at once.
template <class Op>
class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    explicit Plugin(std::vector<Ints> attributes) : attributes(std::move(attributes)) {}

    // -- IPluginV3
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(attributes); }

    // -- core
    const AsciiChar* getPluginName() const noexcept override { return Op::name; }
    const AsciiChar* getPluginVersion() const noexcept override { return VERSION; }
    const AsciiChar* getPluginNamespace() const noexcept override { return NAMESPACE; }

    // -- build
    int32_t configurePlugin(
        const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*, int32_t
    ) noexcept override {
        return 0;
    }
    int32_t getNbOutputs() const noexcept override { return 1; }
    int32_t getOutputDataTypes(DataType* out, int32_t, const DataType* in, int32_t count) const noexcept override {
        if (count != Op::inputs) return -1;
        out[0] = in[0];
        return 0;
    }
    int32_t getOutputShapes(
        const DimsExprs* in, int32_t count, const DimsExprs*, int32_t, DimsExprs* out, int32_t, IExprBuilder& builder
    ) noexcept override {
        if (count != Op::inputs || in[0].nbDims != 4) return -1;
        Op::shape(attributes, in, out[0], builder);
        return 0;
    }
    bool supportsFormatCombination(
        int32_t pos, const DynamicPluginTensorDesc* in_out, int32_t, int32_t
    ) noexcept override {
        const PluginTensorDesc& desc = in_out[pos].desc;
        const bool known =
            desc.type == DataType::kFLOAT || desc.type == DataType::kHALF || desc.type == DataType::kBF16;
        return desc.format == TensorFormat::kLINEAR && known && desc.type == in_out[0].desc.type;
    }

    // -- runtime
    int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept override {
        return 0;
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    int32_t enqueue(
        const PluginTensorDesc* desc, const PluginTensorDesc*, const void* const* in, void* const* out, void*,
        cudaStream_t stream
    ) noexcept override {
        switch (desc[0].type) {
            case DataType::kFLOAT: return Op::template launch<float, Fp32>(attributes, desc, in, out[0], stream);
            case DataType::kHALF: return Op::template launch<Half, Fp16>(attributes, desc, in, out[0], stream);
            case DataType::kBF16: return Op::template launch<Brain, Bf16>(attributes, desc, in, out[0], stream);
            default: return cudaErrorInvalidValue;
        }
    }
    const PluginFieldCollection* getFieldsToSerialize() noexcept override {
        fields.clear();
        for (size_t i = 0; i < attributes.size(); i++) {
            const Ints& values = attributes[i];
            fields.emplace_back(
                Op::names[i], values.data(), PluginFieldType::kINT32, static_cast<int32_t>(values.size())
            );
        }
        collection = {static_cast<int32_t>(fields.size()), fields.data()};
        return &collection;
    }

private:
    std::vector<Ints> attributes;
    std::vector<PluginField> fields;
    PluginFieldCollection collection{};
};

template <class Op>
class Creator final : public IPluginCreatorV3One {
public:
    Creator() {
        for (const char* name : Op::names) fields.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
        collection = {static_cast<int32_t>(fields.size()), fields.data()};
    }

    const AsciiChar* getPluginName() const noexcept override { return Op::name; }
    const AsciiChar* getPluginVersion() const noexcept override { return VERSION; }
    const AsciiChar* getPluginNamespace() const noexcept override { return NAMESPACE; }
    const PluginFieldCollection* getFieldNames() noexcept override { return &collection; }

    // Null when an attribute is missing or can't be: TensorRT then says which node it was.
    IPluginV3* createPlugin(const AsciiChar*, const PluginFieldCollection* given, TensorRTPhase) noexcept override {
        std::vector<Ints> attributes(std::size(Op::names));
        for (int32_t i = 0; i < given->nbFields; i++) {
            const PluginField& field = given->fields[i];
            for (size_t k = 0; k < attributes.size(); k++) {
                if (std::strcmp(field.name, Op::names[k]) != 0) continue;
                for (int32_t n = 0; n < field.length; n++) {
                    if (field.type == PluginFieldType::kINT32)
                        attributes[k].push_back(static_cast<const int32_t*>(field.data)[n]);
                    else if (field.type == PluginFieldType::kINT64)
                        attributes[k].push_back(static_cast<int32_t>(static_cast<const int64_t*>(field.data)[n]));
                    else
                        return nullptr;
                }
            }
        }
        return Op::valid(attributes) ? new (std::nothrow) Plugin<Op>(std::move(attributes)) : nullptr;
    }

private:
    std::vector<PluginField> fields;
    PluginFieldCollection collection{};
};

}  // namespace
}  // namespace liteframe

// What IPluginRegistry::loadLibrary looks for.
#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

EXPORTED nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static liteframe::Creator<liteframe::DepthwiseTemporalConvOp> convolution;
    static liteframe::Creator<liteframe::WeightedAveragePoolOp> pooling;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&convolution, &pooling};
    count = 2;
    return creators;
}
