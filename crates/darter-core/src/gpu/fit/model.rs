//! What a model takes of GPU memory: its weights, and what it keeps of each token (the KV cache).

use serde::Serialize;

/// In what the weights are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 4 bytes.
    Fp32,
    /// 2 bytes; bf16 is the same size.
    Fp16,
    /// 1 byte.
    Fp8,
    /// 1 byte.
    Int8,
    /// 4 bits, and scales and zeros of each group (AWQ, GPTQ): 0.56 bytes at most.
    Int4,
    /// 4 bits and a scale for 32: 0.53 bytes.
    Mxfp4,
}

impl Dtype {
    /// Bytes of one parameter.
    pub const fn bytes(self) -> f64 {
        match self {
            Self::Fp32 => 4.0,
            Self::Fp16 => 2.0,
            Self::Fp8 | Self::Int8 => 1.0,
            Self::Int4 => 0.56,
            Self::Mxfp4 => 0.53,
        }
    }

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Mxfp4 => "mxfp4",
        }
    }
}

/// What of a token is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kv {
    /// Keys and values of each head that has its own.
    Heads {
        /// Layers.
        layers: u32,
        /// KV heads: fewer than attention heads, with GQA.
        kv_heads: u32,
        /// Numbers of one head.
        head_dim: u32,
    },
    /// One latent vector a layer (MLA).
    Latent {
        /// Layers.
        layers: u32,
        /// `kv_lora_rank` and the rope dimension together.
        dim: u32,
    },
}

impl Kv {
    /// Bytes of one token, at so many bytes a number.
    pub fn bytes_per_token(self, bytes: f64) -> f64 {
        match self {
            Self::Heads { layers, kv_heads, head_dim } => {
                2.0 * f64::from(layers) * f64::from(kv_heads) * f64::from(head_dim) * bytes
            }
            Self::Latent { layers, dim } => f64::from(layers) * f64::from(dim) * bytes,
        }
    }

    /// The share of it that each of `gpus` GPUs keeps.
    ///
    /// Heads are dealt out; where there are fewer than GPUs several keep the same; where they cannot be dealt
    /// evenly, and with one latent vector for all, each keeps everything.
    pub fn share(self, gpus: u32) -> f64 {
        match self {
            Self::Heads { kv_heads, .. } if kv_heads.is_multiple_of(gpus) => 1.0 / f64::from(gpus),
            Self::Heads { kv_heads, .. } if kv_heads > 0 && gpus.is_multiple_of(kv_heads) => 1.0 / f64::from(kv_heads),
            Self::Heads { .. } | Self::Latent { .. } => 1.0,
        }
    }
}

/// A model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Model {
    /// All parameters; of a mixture of experts those of all experts.
    pub params: f64,
    /// In what they are kept.
    pub dtype: Dtype,
    /// What is kept of a token, where that is known.
    pub kv: Option<Kv>,
    /// Bytes of each number of that: 2, or 1 with an fp8 cache.
    pub kv_bytes: f64,
}

impl Model {
    /// All weights, in MiB.
    pub fn weights_mib(&self) -> f64 {
        self.params * self.dtype.bytes() / MIB
    }

    /// All that is kept of one token, in bytes.
    pub fn kv_bytes_per_token(&self) -> Option<f64> {
        self.kv.map(|kv| kv.bytes_per_token(self.kv_bytes))
    }
}

/// Bytes of one MiB.
pub(super) const MIB: f64 = 1_048_576.0;

/// A model that is known by name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preset {
    /// Its name.
    pub name: &'static str,
    /// Its parameters, as its weights' index has them.
    pub params: f64,
    /// From its `config.json`.
    pub kv: Kv,
}

const fn preset(name: &'static str, params: f64, layers: u32, kv_heads: u32) -> Preset {
    Preset { name, params, kv: Kv::Heads { layers, kv_heads, head_dim: 128 } }
}

/// The models that are known by name.
pub const PRESETS: [Preset; 6] = [
    preset("llama-2-7b", 6_738_415_616.0, 32, 32),
    preset("llama-2-13b", 13_015_864_320.0, 40, 40),
    preset("llama-3-8b", 8_030_261_248.0, 32, 8),
    preset("llama-3-70b", 70_553_706_496.0, 80, 8),
    preset("mistral-7b", 7_241_732_096.0, 32, 8),
    preset("qwen2.5-7b", 7_615_616_512.0, 28, 4),
];
