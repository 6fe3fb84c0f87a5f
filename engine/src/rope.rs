//! Rotary position embedding: from the configuration to the table of cosines and sines.
//!
//! The table is made once per model and is part of the numerics: its bits must not depend on the C library,
//! so `exp`, `sin` and `cos` are our own, in f64, from IEEE additions and multiplications alone.

use std::f64::consts::{FRAC_PI_2, LN_2, PI};

use kernels::numerics::ln;
use serde::Serialize;

/// How positions become angles.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RopeSpec {
    /// Base of the geometric series of frequencies.
    pub theta: f64,
    /// Features of a head that rotate.
    pub rotated_dim: usize,
    /// Stretching for contexts longer than trained on.
    pub scaling: RopeScaling,
}

/// The kinds of scaling, after Transformers' names.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided (Position Interpolation).
    Linear {
        /// By this.
        factor: f64,
    },
    /// Dynamic NTK changes the base with the length of the sequence, which would make the KV of a token depend
    /// on what comes after it. It is served up to the original length, where it changes nothing.
    Dynamic,
    /// Low frequencies divided, high ones kept, a smooth passage between (Llama 3.1).
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are high ones.
        high_freq_factor: f64,
        /// Length trained on.
        original_max_position: usize,
    },
    /// Each frequency divided by a factor of its own: how GGUF files state Llama 3's scaling.
    Factors {
        /// One for each pair of features.
        factors: Vec<f32>,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        /// Divisor of low frequencies.
        factor: f64,
        /// Length trained on.
        original_max_position: usize,
        /// Rotations above which a feature is kept.
        beta_fast: f64,
        /// Rotations below which a feature is divided.
        beta_slow: f64,
        /// Whether the borders are whole features.
        is_truncated: bool,
        /// Factor on cosines and sines; derived from the next two or from `factor` if absent.
        attention_factor: Option<f64>,
        /// See `attention_factor`.
        mscale: Option<f64>,
        /// See `attention_factor`.
        mscale_all_dim: Option<f64>,
    },
}

/// Cosines and sines of all positions.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeAngles {
    /// `[num_positions, rotated_dim / 2]`
    pub cos: Vec<f32>,
    /// `[num_positions, rotated_dim / 2]`
    pub sin: Vec<f32>,
    /// Features of a head that rotate.
    pub rotated_dim: usize,
}

impl RopeSpec {
    /// Longest sequence that the scaling is meant for, given `max_position_embeddings`.
    pub fn scaled_max_position(&self, stated: usize) -> usize {
        let scaled = |length: usize, factor: f64| ((length as f64 * factor) as usize).min(1 << 26);
        match self.scaling {
            RopeScaling::None | RopeScaling::Dynamic | RopeScaling::Llama3 { .. } | RopeScaling::Factors { .. } => {
                stated
            }
            RopeScaling::Linear { factor } => scaled(stated, factor),
            RopeScaling::Yarn { factor, original_max_position, .. } => scaled(original_max_position, factor),
        }
    }

    /// The table for positions `0..num_positions`.
    pub fn angles(&self, num_positions: usize) -> RopeAngles {
        let factor = self.attention_factor();
        let frequencies: Vec<f32> = self.frequencies().into_iter().map(|f| f as f32).collect();
        let mut angles = RopeAngles {
            cos: Vec::with_capacity(num_positions * frequencies.len()),
            sin: Vec::with_capacity(num_positions * frequencies.len()),
            rotated_dim: self.rotated_dim,
        };
        for position in 0..num_positions {
            for frequency in &frequencies {
                // The product is in f32, as Transformers has it: at long positions the rounding counts.
                let (sin, cos) = sin_cos(f64::from(position as f32 * frequency));
                angles.cos.push((cos * factor) as f32);
                angles.sin.push((sin * factor) as f32);
            }
        }
        angles
    }

    /// Radians per position of each rotating pair of features, highest first.
    fn frequencies(&self) -> Vec<f64> {
        let dim = self.rotated_dim as f64;
        let plain = (0..self.rotated_dim / 2).map(|i| exp(-(2.0 * i as f64 / dim) * ln(self.theta)));
        match self.scaling {
            RopeScaling::None | RopeScaling::Dynamic => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
            RopeScaling::Factors { ref factors } => {
                plain.zip(factors).map(|(frequency, factor)| frequency / f64::from(*factor)).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let original = original_max_position as f64;
                let scale = |frequency: f64| {
                    let wavelength = 2.0 * PI / frequency;
                    if wavelength < original / high_freq_factor {
                        frequency
                    } else if wavelength > original / low_freq_factor {
                        frequency / factor
                    } else {
                        let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                };
                plain.map(scale).collect()
            }
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, is_truncated, .. } => {
                // The feature that makes this many rotations over the original length.
                let feature = |rotations: f64| {
                    dim * ln(original_max_position as f64 / (rotations * 2.0 * PI)) / (2.0 * ln(self.theta))
                };
                let (mut low, mut high) = (feature(beta_fast), feature(beta_slow));
                if is_truncated {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let scale = |(i, frequency): (usize, f64)| {
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    frequency / factor * divided + frequency * (1.0 - divided)
                };
                plain.enumerate().map(scale).collect()
            }
        }
    }

    /// By what the scaling divides each frequency.
    pub(crate) fn frequency_factors(&self) -> Vec<f32> {
        let plain = RopeSpec { scaling: RopeScaling::None, ..self.clone() }.frequencies();
        plain.iter().zip(self.frequencies()).map(|(plain, scaled)| (plain / scaled) as f32).collect()
    }

    pub(crate) fn attention_factor(&self) -> f64 {
        let RopeScaling::Yarn { factor, attention_factor, mscale, mscale_all_dim, .. } = self.scaling else {
            return 1.0;
        };
        let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * ln(factor) + 1.0 };
        match (attention_factor, mscale, mscale_all_dim) {
            (Some(factor), ..) => factor,
            (None, Some(mscale), Some(all)) => scale(mscale) / scale(all),
            _ => scale(1.0),
        }
    }
}

/// `e^x` for moderate `x`: a power of two times a Taylor series.
fn exp(x: f64) -> f64 {
    let n = (x / LN_2).round();
    let r = x - n * LN_2;
    let mut sum = 1.0;
    for i in (1..=18).rev() {
        sum = sum * r / f64::from(i) + 1.0;
    }
    let power = f64::from_bits(((1023 + n.clamp(-1000.0, 1000.0) as i64) as u64) << 52);
    sum * power
}

/// Sine and cosine for angles up to some millions: a remainder of quarter turns, then Taylor series.
fn sin_cos(x: f64) -> (f64, f64) {
    /// What `FRAC_PI_2` lacks of pi / 2.
    const REST: f64 = 6.123_233_995_736_766e-17;
    let n = (x / FRAC_PI_2).round();
    let r = (-n).mul_add(REST, (-n).mul_add(FRAC_PI_2, x));
    let square = r * r;
    let (mut sin, mut cos) = (1.0, 1.0);
    for i in (1..=10).rev() {
        let i = f64::from(2 * i);
        sin = 1.0 - sin * square / (i * (i + 1.0));
        cos = 1.0 - cos * square / (i * (i - 1.0));
    }
    sin *= r;
    match (n as i64).rem_euclid(4) {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_functions_agree_with_the_library() {
        for i in 0..20_000 {
            let x = f64::from(i) * 7.77 + 0.001 * f64::from(i);
            let (sin, cos) = sin_cos(x);
            assert!((sin - x.sin()).abs() < 1e-11 && (cos - x.cos()).abs() < 1e-11, "{x}");
        }
        for x in [0.0, -0.3, -13.8, -20.0, 5.5, 1.0] {
            assert!((exp(x) - x.exp()).abs() <= 1e-14 * x.exp(), "{x}");
        }
    }

    #[test]
    fn first_position_turns_nothing_and_first_feature_turns_by_one() {
        let rope = RopeSpec { theta: 10_000.0, rotated_dim: 8, scaling: RopeScaling::None };
        let angles = rope.angles(3);
        assert_eq!((&angles.cos[..4], &angles.sin[..4]), (&[1.0; 4][..], &[0.0; 4][..]));
        assert_eq!((angles.cos[4], angles.sin[8]), (1f32.cos(), 2f32.sin()));
        assert_eq!(angles.cos.len(), 12);
    }

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_position: 64 };
        let plain = RopeSpec { theta: 500_000.0, rotated_dim: 16, scaling: RopeScaling::None };
        let scaled = RopeSpec { scaling, ..plain.clone() }.frequencies();
        let plain = plain.frequencies();
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[7], plain[7] / 8.0);
        assert!(scaled.iter().zip(&plain).all(|(s, p)| s <= p && *s >= p / 8.0));
    }

    #[test]
    fn yarn_derives_its_attention_factor() {
        let scaling = RopeScaling::Yarn {
            factor: 8.0,
            original_max_position: 64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            is_truncated: true,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
        };
        let rope = RopeSpec { theta: 10_000.0, rotated_dim: 48, scaling };
        assert!((rope.attention_factor() - (0.1 * 8f64.ln() + 1.0)).abs() < 1e-12);
        assert_eq!(rope.scaled_max_position(512), 512);
    }
}
