# Decides about CUDA and enables the language. Sets PYPPO_CUDA_FOUND, PYPPO_CUDA_STATUS (a sentence), PYPPO_CUDA_VERSION,
# PYPPO_CUDA_ARCHS, PYPPO_CUDA_FLAGS. Asked anew at each configuration, so a toolkit that comes or goes is noticed.

set(PYPPO_CUDA_FOUND OFF)
set(PYPPO_CUDA_VERSION "")
set(PYPPO_CUDA_ARCHS "")
if(NOT PYPPO_CUDA MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "PYPPO_CUDA is '${PYPPO_CUDA}'; it must be 0 (left out), 1 (required) or unset (if nvcc works)")
endif()

if(PYPPO_CUDA STREQUAL "0")
  set(PYPPO_CUDA_STATUS "left out (PYPPO_CUDA=0)")
  return()
endif()

if(DEFINED ENV{CUDACXX})
  set(places "at $ENV{CUDACXX}, which CUDACXX names")
  find_program(nvcc NAMES "$ENV{CUDACXX}" NO_CACHE)
else()
  set(places "on PATH, in CUDA_HOME or in /usr/local/cuda")
  find_program(nvcc NAMES nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
endif()
if(NOT nvcc)
  set(PYPPO_CUDA_STATUS "left out (no nvcc ${places})")
  if(PYPPO_CUDA STREQUAL "1")
    message(FATAL_ERROR "PYPPO_CUDA=1, but there is no nvcc ${places}. "
                        "Install the CUDA toolkit, or unset PYPPO_CUDA for a build without CUDA.")
  endif()
  return()
endif()

# A whole compilation and link, for each architecture: nvcc may be there while its host compiler, headers or an
# architecture is not.
set(gencodes "-gencode=arch=compute_80,code=sm_80" "-gencode=arch=compute_90,code=[sm_90,compute_90]")
set(trial "${CMAKE_BINARY_DIR}/nvcc_trial")
file(WRITE "${trial}.cu" "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n#include <algorithm>\n"
                         "__global__ void k(__half* p) { *p = __float2half(1.f); }\n"
                         "int main() { k<<<1, 1>>>(nullptr); return cudaDeviceSynchronize(); }\n")
execute_process(
  COMMAND "${nvcc}" -std=c++17 -cudart=static "-ccbin=${CMAKE_CXX_COMPILER}" ${gencodes} "${trial}.cu" -o "${trial}"
  RESULT_VARIABLE failed
  OUTPUT_VARIABLE log
  ERROR_VARIABLE log)
if(failed)
  if(PYPPO_CUDA STREQUAL "1")
    message(FATAL_ERROR "PYPPO_CUDA=1, but ${nvcc} cannot compile for sm_80 and sm_90:\n${log}")
  endif()
  message(WARNING "${nvcc} cannot compile for sm_80 and sm_90; building without CUDA:\n${log}")
  set(PYPPO_CUDA_STATUS "left out (nvcc was found but does not work)")
  return()
endif()

set(PYPPO_CUDA_FOUND ON)
set(CMAKE_CUDA_COMPILER "${nvcc}")
set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 90-virtual)
enable_language(CUDA)

set(PYPPO_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
set(PYPPO_CUDA_ARCHS "sm_80,sm_90,compute_90")
set(PYPPO_CUDA_STATUS "${PYPPO_CUDA_VERSION} for ${PYPPO_CUDA_ARCHS}")
set(PYPPO_CUDA_FLAGS -Xcompiler=-Wall,-Wextra)
if(PYPPO_WERROR)
  list(APPEND PYPPO_CUDA_FLAGS -Werror=all-warnings -Xcompiler=-Werror)
endif()
if(PYPPO_CUDA_PROFILE)
  list(APPEND PYPPO_CUDA_FLAGS -lineinfo -Xptxas=-v)
endif()
