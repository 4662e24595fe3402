# Finds LibTorch for wmha and for programs that use it: makes the target wmha::torch.
#
# PyTorch's own find_package(Torch) also searches for the whole CUDA toolkit if torch was built with CUDA, and fails where
# that isn't there. Neither wmha's CPU build nor a program that links it needs the toolkit, so this looks for torch alone:
#   TORCH_ROOT         the folder that holds torch's include and lib; by default that of
#   find_package(Torch) where the program has called it,
#   CMAKE_PREFIX_PATH  a libtorch, or torch.utils.cmake_prefix_path
#   site-packages      the torch beside wmha's own Python package
#   python3            the torch that it imports
#
# It may be included more than once: each find_package(wmha) needs the variables, only the first one makes the target.

if(NOT TORCH_ROOT AND TARGET torch)
  set(TORCH_ROOT "${TORCH_INSTALL_PREFIX}")
endif()
if(NOT TORCH_ROOT)
  find_path(wmha_torch_include torch/headeronly/version.h
            PATH_SUFFIXES include ../../include
            PATHS "${CMAKE_CURRENT_LIST_DIR}/../../../../torch/include") # beside an installed Python package
  if(NOT wmha_torch_include)
    execute_process(
      COMMAND python3 -c "import importlib.util; print(importlib.util.find_spec('torch').submodule_search_locations[0])"
      OUTPUT_VARIABLE wmha_python_torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_path(wmha_torch_include torch/headeronly/version.h PATHS "${wmha_python_torch}/include" NO_DEFAULT_PATH)
  endif()
  if(NOT wmha_torch_include)
    message(FATAL_ERROR "wmha needs LibTorch. Set CMAKE_PREFIX_PATH to a libtorch folder or to the output of\n"
                        "  python3 -c 'import torch; print(torch.utils.cmake_prefix_path)'")
  endif()
  get_filename_component(TORCH_ROOT "${wmha_torch_include}/.." REALPATH)
endif()
if(NOT EXISTS "${TORCH_ROOT}/include/torch/headeronly/version.h")
  message(FATAL_ERROR "wmha supports torch 2.13 and 2.14, and TORCH_ROOT=${TORCH_ROOT} holds neither")
endif()

file(STRINGS "${TORCH_ROOT}/include/torch/headeronly/version.h" wmha_version_lines
     REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE "[^0-9;]" "" wmha_version_numbers "${wmha_version_lines}")
string(REPLACE ";" "." WMHA_TORCH_VERSION "${wmha_version_numbers}")
if(WMHA_TORCH_VERSION VERSION_LESS 2.13 OR WMHA_TORCH_VERSION VERSION_GREATER_EQUAL 2.15)
  message(FATAL_ERROR "wmha supports torch 2.13 and 2.14, found ${WMHA_TORCH_VERSION} in ${TORCH_ROOT}")
endif()

if(NOT TARGET wmha::torch)
  add_library(wmha::torch INTERFACE IMPORTED)
  set(wmha_torch_includes "${TORCH_ROOT}/include;${TORCH_ROOT}/include/torch/csrc/api/include")
  set_target_properties(wmha::torch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${wmha_torch_includes}"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${wmha_torch_includes}"
    INTERFACE_COMPILE_FEATURES cxx_std_20
    INTERFACE_LINK_LIBRARIES
      "${TORCH_ROOT}/lib/libtorch.so;${TORCH_ROOT}/lib/libtorch_cpu.so;${TORCH_ROOT}/lib/libc10.so")

  # Torch's CUDA operators register themselves when their library is loaded: it stays linked to programs though they use
  # no symbol of it. Not to libraries: they work with torch's CPU build too.
  if(EXISTS "${TORCH_ROOT}/lib/libtorch_cuda.so")
    set(wmha_torch_cuda "${TORCH_ROOT}/lib/libtorch_cuda.so,${TORCH_ROOT}/lib/libc10_cuda.so")
    set_property(TARGET wmha::torch PROPERTY INTERFACE_LINK_OPTIONS
      "$<$<STREQUAL:$<TARGET_PROPERTY:TYPE>,EXECUTABLE>:LINKER:--push-state,--no-as-needed,${wmha_torch_cuda},--pop-state>")
  endif()
endif()
