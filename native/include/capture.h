// What a batch asks to see of a step, as src/pellucid/core/capture.py describes it, and the clock of its operations.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

namespace pellucid {

// core/capture.py LAYER_OPERATIONS, in the order in which a layer goes through them.
enum class LayerOperation : int { kAttentionInput, kQkv, kAttention, kOutput, kMlpInput, kGateUp, kDown };
constexpr int kLayerOperations = 7;

// core/capture.py SequenceCapture.
struct SequenceCapture {
    int num_tokens = 0;
    int num_points = 0;
    int num_queries = 0;
    int num_heads = 0;
    int num_keys = 0;
    const int32_t* tokens = nullptr;           // [num_tokens]
    const int32_t* residual_points = nullptr;  // [num_points]
    const int32_t* queries = nullptr;          // [num_queries]
    const int32_t* heads = nullptr;            // [num_heads]
    float* residual = nullptr;                 // [num_points][num_tokens][hidden_size]
    std::vector<float*> mlp;                   // by layer, null where not wanted: [num_tokens][intermediate_size]
    std::vector<float*> attention;             // by layer, null where not wanted: [num_heads][num_queries][num_keys]
};

// core/capture.py StepCapture.
struct StepCapture {
    std::vector<SequenceCapture> sequences;
    double* seconds = nullptr;  // [1 + num_layers * kLayerOperations + 2], or null
};

// Adds up what each operation takes, on the thread that reads it.
class OperationClock {
  public:
    void start(double* seconds) {
        seconds_ = seconds;
        resume();
    }
    // What was done since the last call, of either function, was `operation` (core/capture.py operation_names).
    void done(int operation) {
        if (seconds_ == nullptr) return;
        const Clock::time_point now = Clock::now();
        seconds_[operation] += std::chrono::duration<double>(now - since_).count();
        since_ = now;
    }
    // What was done since the last call counts nowhere.
    void resume() {
        if (seconds_ != nullptr) since_ = Clock::now();
    }

  private:
    using Clock = std::chrono::steady_clock;
    double* seconds_ = nullptr;
    Clock::time_point since_;
};

}  // namespace pellucid
