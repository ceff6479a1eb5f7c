// The part of DLPack 1.x that is used here: its data layout and its C exchange API, as frozen by
// https://dmlc.github.io/dlpack (major version 1). tests/test_dlpack.py holds it against torch's own header.
#pragma once

#include <cstdint>

namespace pyppo {

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3 };
enum DLDataTypeCode : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };
enum DLFlags : uint64_t { kDLReadOnly = 1 };

struct DLVersion {
  uint32_t major, minor;
};
struct DLDevice {
  DLDeviceType type;
  int32_t id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct DLManagedTensor {  // what `__dlpack__()` gave before version 1
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct DLManagedTensorVersioned {
  DLVersion version;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor tensor;
};

struct DLExchangeAPI {  // found on a tensor's type, `__dlpack_c_exchange_api__`
  DLVersion version;
  const DLExchangeAPI* previous;
  int (*allocate)(DLTensor* prototype, DLManagedTensorVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, DLManagedTensorVersioned** out);
  int (*managed_to_object)(DLManagedTensorVersioned* tensor, void** out);
  int (*tensor_from_object)(void* object, DLTensor* out);
  int (*current_work_stream)(DLDeviceType type, int32_t id, void** out);
};

}  // namespace pyppo
