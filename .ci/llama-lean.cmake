# llama-cpp-python forces llama.cpp's "common" utilities on, which the library does not need: leaving them out
# takes two thirds off the build. CMake reads this file right after llama.cpp's project() line.
set(LLAMA_BUILD_COMMON OFF)
