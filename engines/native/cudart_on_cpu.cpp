// As much of CUDA's runtime as libliteframe_plugins.so calls, on a CPU: a launch runs the kernel of that name in
// emulated.cpp. Host code that nvcc makes registers its kernels and launches them by these functions.

#include <cuda_runtime.h>

#include <map>

extern "C" int liteframe_launch(
    const char* name, const unsigned* grid, unsigned threads, unsigned shared, void* const* arguments, int count,
    int falling
);

namespace {

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} pushed;

std::map<const void*, const char*>& names() {  // there before the plugins' own are made
    static std::map<const void*, const char*> all;
    return all;
}

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*
) {
    names()[function] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    pushed = {grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
    *static_cast<cudaStream_t*>(stream) = pushed.stream;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(
    const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t
) {
    const unsigned sizes[] = {grid.x, grid.y, grid.z};
    const int failed = liteframe_launch(
        names().at(function), sizes, block.x, static_cast<unsigned>(shared), arguments, -1, 0
    );
    return failed || block.y != 1 || block.z != 1 ? cudaErrorInvalidValue : cudaSuccess;
}

// by which CUDA 13 does the same
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream
) {
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, stream);
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
}
