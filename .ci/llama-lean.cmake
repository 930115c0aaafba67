# llama-cpp-python forces llama.cpp's "common" utilities on, which the library does not need: leaving them out
# takes two thirds off the build. CMake reads this file right after llama.cpp's project() line.
set(LLAMA_BUILD_COMMON OFF)

# GCC before 14 (but for 11.5, 12.4 and 13.3) drops the writes of the tile configuration that AMX's intrinsics load
# (https://gcc.gnu.org/PR114098): llama.cpp then dies of SIGSEGV in the first batch of a quantized model, on Intel
# processors of 2023 and later. Without this macro it leaves AMX alone and uses AVX-512.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14)
    add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-U__AMX_INT8__>)
endif()
