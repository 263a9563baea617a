// The plugin library as TensorRT handles it up to the launch: found by its symbols, made from attributes, asked for
// shapes and types, copied and saved. Expressions of shapes are TensorRT's own; here numbers stand for them.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace {

using namespace nvinfer1;

int failures = 0;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::printf("failed: %s\n", what);
    failures++;
}

class Number final : public IDimensionExpr, private apiv::VDimensionExpr {
public:
    explicit Number(int64_t value) : value(value) { mImpl = this; }
    const int64_t value;

private:
    bool isConstant() const noexcept override { return true; }
    int64_t getConstantValue() const noexcept override { return value; }
    bool isSizeTensor() const noexcept override { return false; }
};

class Numbers final : public IExprBuilder, private apiv::VExprBuilder {
public:
    Numbers() { mImpl = this; }

    DimsExprs shape(std::initializer_list<int64_t> sizes) {
        DimsExprs out{static_cast<int32_t>(sizes.size()), {}};
        int32_t axis = 0;
        for (int64_t size : sizes) out.d[axis++] = make(size);
        return out;
    }

private:
    const Number* make(int64_t value) { return made.emplace_back(std::make_unique<Number>(value)).get(); }
    const IDimensionExpr* constant(int64_t value) noexcept override { return make(value); }
    const IDimensionExpr* operation(
        DimensionOperation op, const IDimensionExpr& a, const IDimensionExpr& b
    ) noexcept override {
        const int64_t x = a.getConstantValue(), y = b.getConstantValue();
        return op == DimensionOperation::kCEIL_DIV ? make((x + y - 1) / y) : nullptr;
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) noexcept override {
        return nullptr;
    }

    std::vector<std::unique_ptr<Number>> made;
};

using Ints = std::vector<int32_t>;

IPluginV3* create(IPluginCreatorV3One* creator, const std::vector<std::pair<const char*, const Ints*>>& attributes) {
    std::vector<PluginField> fields;
    for (const auto& [name, values] : attributes)
        fields.emplace_back(name, values->data(), PluginFieldType::kINT32, static_cast<int32_t>(values->size()));
    const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    return creator->createPlugin("node", &collection, TensorRTPhase::kBUILD);
}

std::vector<int64_t> shape_of(IPluginV3* plugin, const std::vector<std::vector<int64_t>>& inputs) {
    auto* build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    Numbers numbers;
    std::vector<DimsExprs> given;
    for (const auto& sizes : inputs) {
        given.push_back(numbers.shape({}));
        given.back().nbDims = static_cast<int32_t>(sizes.size());
        for (size_t i = 0; i < sizes.size(); i++) given.back().d[i] = numbers.shape({sizes[i]}).d[0];
    }
    DimsExprs out{};
    const auto count = static_cast<int32_t>(given.size());
    if (build->getOutputShapes(given.data(), count, nullptr, 0, &out, 1, numbers) != 0) return {};
    std::vector<int64_t> found;
    for (int32_t i = 0; i < out.nbDims; i++) found.push_back(out.d[i]->getConstantValue());
    return found;
}

bool supports(IPluginV3* plugin, std::initializer_list<DataType> types, TensorFormat format = TensorFormat::kLINEAR) {
    auto* build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    std::vector<DynamicPluginTensorDesc> all(types.size());
    int32_t i = 0;
    for (DataType type : types) all[i].desc.type = type, all[i++].desc.format = format;
    for (i = 0; i < static_cast<int32_t>(all.size()); i++) {
        if (!build->supportsFormatCombination(i, all.data(), static_cast<int32_t>(all.size()) - 1, 1)) return false;
    }
    return true;
}

std::vector<Ints> saved(IPluginV3* plugin) {
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    const PluginFieldCollection* fields = runtime->getFieldsToSerialize();
    std::vector<Ints> out;
    for (int32_t i = 0; i < fields->nbFields; i++) {
        const auto* values = static_cast<const int32_t*>(fields->fields[i].data);
        out.emplace_back(values, values + fields->fields[i].length);
    }
    return out;
}

}  // namespace

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) return std::printf("%s\n", dlerror()), 1;
    expect(dlsym(library, "setLoggerFinder"), "setLoggerFinder is there");
    using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
    const auto get_creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    if (!get_creators) return std::printf("no getCreators\n"), 1;
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = get_creators(count);
    if (count != 2) return std::printf("%d creators\n", count), 1;
    auto* convolution = static_cast<IPluginCreatorV3One*>(creators[0]);
    auto* pooling = static_cast<IPluginCreatorV3One*>(creators[1]);
    expect(!std::strcmp(convolution->getPluginName(), "DepthwiseTemporalConv"), "the convolution's name");
    expect(!std::strcmp(pooling->getPluginName(), "WeightedAveragePool"), "the pooling's name");
    for (IPluginCreatorV3One* creator : {convolution, pooling}) {
        expect(!std::strcmp(creator->getPluginNamespace(), "liteframe"), "the namespace");
        expect(!std::strcmp(creator->getPluginVersion(), "1"), "the version");
    }

    // attributes: the node's others are not asked for
    const Ints row{1025}, grid{32, 32}, stay{1, 1}, halve{2, 2, 2}, none{}, zero{0, 1}, blocks{1, 4, 16, 2, 16, 2};
    expect(convolution->getFieldNames()->nbFields == 2 && pooling->getFieldNames()->nbFields == 1, "attributes");
    expect(!create(convolution, {{"grid", &row}}), "strides are asked for");
    expect(!create(convolution, {{"grid", &grid}, {"strides", &stay}}), "as many strides as axes");
    expect(!create(convolution, {{"grid", &row}, {"strides", &zero}}), "positive strides");
    expect(!create(convolution, {{"grid", &none}, {"strides", &stay}}), "a grid");
    expect(!create(pooling, {{"blocks", &row}}), "six numbers of blocks");
    const std::unique_ptr<IPluginV3> temporal{create(convolution, {{"grid", &row}, {"strides", &stay}})};
    const std::unique_ptr<IPluginV3> strided{create(convolution, {{"strides", &halve}, {"grid", &grid}, {"x", &row}})};
    const std::unique_ptr<IPluginV3> pool{create(pooling, {{"blocks", &blocks}})};
    if (!temporal || !strided || !pool) return std::printf("a plugin was not made\n"), 1;

    // shapes, with any number of clips
    using Shape = std::vector<int64_t>;
    for (int64_t clips : {1, 7}) {
        const Shape kept = shape_of(temporal.get(), {{clips, 4, 1025, 768}, {768, 1, 3, 1}, {768}});
        expect(kept == Shape{clips, 4, 1025, 768}, "a temporal convolution keeps its shape");
        const Shape halved = shape_of(strided.get(), {{clips, 4, 1024, 768}, {768, 1, 3, 3, 3}, {768}});
        expect(halved == Shape{clips, 2, 256, 768}, "a strided convolution halves each axis");
        const Shape pooled = shape_of(pool.get(), {{clips, 4, 1025, 1024}});
        expect(pooled == Shape{clips, 256, 1024}, "pooling leaves a token for each block");
    }
    expect(shape_of(temporal.get(), {{1, 4, 1025, 768}}).empty(), "a convolution takes three inputs");
    expect(shape_of(pool.get(), {{4, 1025, 1024}}).empty(), "pooling takes four axes");

    // types and formats: one type throughout, linear
    for (DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        expect(supports(temporal.get(), {type, type, type, type}), "a type of a convolution");
        expect(supports(pool.get(), {type, type}), "a type of pooling");
        DataType out = DataType::kINT32;
        const DataType in[] = {type, type, type};
        auto* build = static_cast<IPluginV3OneBuild*>(temporal->getCapabilityInterface(PluginCapabilityType::kBUILD));
        expect(build->getOutputDataTypes(&out, 1, in, 3) == 0 && out == type, "the output has the input's type");
    }
    expect(!supports(pool.get(), {DataType::kINT8, DataType::kINT8}), "INT8 is refused");
    expect(!supports(pool.get(), {DataType::kFLOAT, DataType::kHALF}), "mixed types are refused");
    expect(!supports(pool.get(), {DataType::kHALF, DataType::kHALF}, TensorFormat::kCHW32), "other formats are refused");

    // copied, saved and made again, from many threads at once
    expect(saved(temporal.get()) == std::vector<Ints>{row, stay}, "what a convolution saves");
    expect(saved(pool.get()) == std::vector<Ints>{blocks}, "what pooling saves");
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++) {
        threads.emplace_back([&] {
            for (int n = 0; n < 200; n++) {
                const std::unique_ptr<IPluginV3> copy{strided->clone()};
                const std::vector<Ints> fields = saved(copy.get());
                const std::unique_ptr<IPluginV3> again{
                    create(convolution, {{"grid", &fields[0]}, {"strides", &fields[1]}})
                };
                expect(again && saved(again.get()) == std::vector<Ints>{grid, halve}, "a plugin made again");
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    std::printf("%d failures\n", failures);
    return failures != 0;
}
