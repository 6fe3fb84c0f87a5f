//! What a node computes on.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;

/// What an operator chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU if it can run the model, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
    /// Nothing: a model is simulated.
    Sim,
}

/// Which kernel of a GPU computes the attention of prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum PrefillAttention {
    /// The one that runs on every GPU.
    #[default]
    Portable,
    /// The one for compute capability 9.0 (H100, H200) where it can run the model, else the portable one.
    Auto,
}

impl fmt::Display for PrefillAttention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value().expect("no variant is hidden");
        f.write_str(value.get_name())
    }
}

/// A device that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a device: expected auto, cpu, a GPU such as cuda:0, or sim")]
pub struct InvalidDevice(pub String);

impl FromStr for DeviceChoice {
    type Err = InvalidDevice;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_number = |text: &&str| text.bytes().all(|byte| byte.is_ascii_digit());
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "sim" => Ok(DeviceChoice::Sim),
            _ => {
                let number = text.strip_prefix("cuda:").filter(is_number).and_then(|number| number.parse().ok());
                number.map(DeviceChoice::Cuda).ok_or_else(|| InvalidDevice(text.to_owned()))
            }
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            DeviceChoice::Sim => f.write_str("sim"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for good in ["auto", "cpu", "cuda:0", "cuda:7", "sim"] {
            assert_eq!(good.parse::<DeviceChoice>().unwrap().to_string(), good);
        }
        for bad in ["", "gpu", "sim:0", "cuda", "cuda:", "cuda:-1", "cuda:+1", "CUDA:0", "cuda:99999999999999999999999"]
        {
            assert!(bad.parse::<DeviceChoice>().is_err(), "{bad}");
        }
    }
}
