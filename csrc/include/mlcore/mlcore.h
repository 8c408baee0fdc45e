// mlcore's C API: one function per kernel over borrowed DLTensors. Include this, link mlcore::mlcore.
#ifndef MLCORE_H_
#define MLCORE_H_

#include "mlcore/aft.h"
#include "mlcore/api.h"
#include "mlcore/attention.h"
#include "mlcore/binary_conv2d.h"
#include "mlcore/binary_linear.h"
#include "mlcore/causal_conv1d.h"
#include "mlcore/depthwise_conv.h"
#include "mlcore/layer_norm.h"
#include "mlcore/linear_attention.h"
#include "mlcore/quant_linear.h"
#include "mlcore/rms_norm.h"
#include "mlcore/separable_conv.h"

#endif  // MLCORE_H_
