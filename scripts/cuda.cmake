# Turns CUDA on: the language, the architectures, the runtime. PyTorch's find_package(CUDA) wants the whole toolkit; this
# needs nvcc, the runtime's headers and its library.
#
# Environment: TORCH_CUDA_ARCH_LIST as for PyTorch's own extensions, "8.0;9.0+PTX" or "8.0 9.0+PTX".

if(NOT EXISTS "${TORCH_ROOT}/lib/libc10_cuda.so")
  message(FATAL_ERROR "WMHA_CUDA is on (FORCE_CUDA=1 in the environment sets it), but the torch in ${TORCH_ROOT} is built "
                      "without CUDA")
endif()

set(WMHA_CUDA_ARCH_LIST "8.0;9.0;10.0;12.0+PTX" CACHE STRING "What TORCH_CUDA_ARCH_LIST said last")
if(NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
  set_property(CACHE WMHA_CUDA_ARCH_LIST PROPERTY VALUE "$ENV{TORCH_CUDA_ARCH_LIST}")
endif()
set(CMAKE_CUDA_ARCHITECTURES)
string(REPLACE " " ";" wmha_arch_list "${WMHA_CUDA_ARCH_LIST}")
foreach(arch IN LISTS wmha_arch_list)
  if(NOT arch MATCHES "^([0-9]+)\\.([0-9]+[af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0 or 9.0+PTX, got '${arch}'")
  endif()
  if(CMAKE_MATCH_1 LESS 8)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: wmha's CUDA kernels need 8.0 or newer, got '${arch}'")
  endif()
  if(CMAKE_MATCH_3)
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${CMAKE_MATCH_1}${CMAKE_MATCH_2})
  else()
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${CMAKE_MATCH_1}${CMAKE_MATCH_2}-real)
  endif()
endforeach()

if("$ENV{CUDACXX}" STREQUAL "" AND NOT "$ENV{CUDA_HOME}" STREQUAL "" AND NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER "$ENV{CUDA_HOME}/bin/nvcc")
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
set(CMAKE_CUDA_STANDARD 17) # older versions of CMake know no newer one for nvcc
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13) # a tenth of the size; every driver for CUDA 13 can read it
  string(APPEND CMAKE_CUDA_FLAGS " --compress-mode=size")
endif()
find_library(WMHA_CUDART cudart PATHS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} NO_DEFAULT_PATH REQUIRED)
