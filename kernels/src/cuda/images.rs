//! Compiled kernels: which image of a kernel file a device gets.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};

/// Names a folder whose `<name>.cubin` files are loaded instead of the embedded kernels, all of them.
pub const KERNELS_FOLDER_VARIABLE: &str = "TANDEM_CUDA_KERNELS";

/// One kernel file as it was compiled into this program.
#[derive(Debug)]
pub struct Embedded {
    /// Name of the file without its ending.
    pub name: &'static str,
    /// Its kernels.
    pub entries: &'static [&'static str],
    cubin: &'static [u8],
    /// For other devices, if it is for any.
    ptx: Option<&'static str>,
    /// With all its headers, for [a compiler on the machine](super::nvrtc).
    pub(super) source: &'static str,
}

include!(concat!(env!("OUT_DIR"), "/cuda_kernels.rs"));

/// What is handed to the driver.
#[derive(Debug, PartialEq, Eq)]
pub enum Image {
    /// Machine code.
    Cubin(Cow<'static, [u8]>),
    /// Text that the driver compiles.
    Ptx(&'static str),
}

/// Why a kernel file has no image for a device.
#[derive(Debug, PartialEq, Eq)]
pub enum ImageError {
    /// The device is older than the kernels.
    TooOld {
        /// Its compute capability.
        capability: (u32, u32),
    },
    /// It is for compute capability 9.0 alone.
    OnlyHopper {
        /// That of the device.
        capability: (u32, u32),
    },
    /// A file of the folder cannot be read.
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageError::TooOld { capability: (major, minor) } => write!(
                f,
                "the GPU has compute capability {major}.{minor}, the kernels need 8.0 or later: use another GPU or the CPU"
            ),
            ImageError::OnlyHopper { capability: (major, minor) } => {
                write!(f, "the GPU has compute capability {major}.{minor}, the kernel is for 9.0 alone")
            }
            ImageError::Unreadable { path, reason } => write!(
                f,
                "{} cannot be read ({reason}): {KERNELS_FOLDER_VARIABLE} must name a folder with a cubin of every kernel file, or be unset",
                path.display()
            ),
        }
    }
}

impl std::error::Error for ImageError {}

impl Embedded {
    /// Whether it is for compute capability 9.0 alone. Every device does without it.
    pub fn is_hopper(&self) -> bool {
        self.ptx.is_none()
    }

    /// The image for a device of this compute capability: from `folder` if given, else the embedded machine
    /// code where it fits (sm_90a is for 9.0 alone), else PTX.
    ///
    /// # Errors
    /// [`ImageError`]; nothing falls back silently.
    pub fn image(&self, capability: (u32, u32), folder: Option<&Path>) -> Result<Image, ImageError> {
        if capability < (8, 0) {
            return Err(ImageError::TooOld { capability });
        }
        if self.is_hopper() && capability != (9, 0) {
            return Err(ImageError::OnlyHopper { capability });
        }
        if let Some(folder) = folder {
            let path = folder.join(self.name).with_extension("cubin");
            return match std::fs::read(&path) {
                Ok(bytes) => Ok(Image::Cubin(Cow::Owned(bytes))),
                Err(error) => Err(ImageError::Unreadable { path, reason: error.to_string() }),
            };
        }
        match self.ptx {
            Some(ptx) if capability != (9, 0) => Ok(Image::Ptx(ptx)),
            _ => Ok(Image::Cubin(Cow::Borrowed(self.cubin))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(name: &str) -> &'static Embedded {
        EMBEDDED.iter().find(|kernel| kernel.name == name).unwrap()
    }

    #[test]
    fn machine_code_is_for_one_capability_and_ptx_for_the_others() {
        for kernel in EMBEDDED {
            assert!(!kernel.entries.is_empty(), "{}", kernel.name);
            assert!(matches!(kernel.image((9, 0), None), Ok(Image::Cubin(bytes)) if bytes.starts_with(b"\x7fELF")));
            for capability in [(8, 0), (8, 9), (10, 0)] {
                match kernel.ptx {
                    Some(ptx) => assert_eq!(kernel.image(capability, None), Ok(Image::Ptx(ptx))),
                    None => assert_eq!(kernel.image(capability, None), Err(ImageError::OnlyHopper { capability })),
                }
            }
        }
        assert_eq!(kernel("block_copy").entries, ["copy_blocks", "clear_blocks"]);
        assert!(kernel("attention_prefill").ptx.unwrap().contains(".target sm_80"));
        let only_hopper: Vec<_> =
            EMBEDDED.iter().filter(|kernel| kernel.is_hopper()).map(|kernel| kernel.name).collect();
        assert_eq!(only_hopper, ["attention_prefill_hopper"]);
        assert_eq!(
            kernel("attention_prefill_hopper").entries,
            ["attention_prefill_hopper_64", "attention_prefill_hopper_128"]
        );
    }

    #[test]
    fn an_old_device_is_a_sentence() {
        let error = kernel("embed").image((7, 5), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the GPU has compute capability 7.5, the kernels need 8.0 or later: use another GPU or the CPU"
        );
    }

    #[test]
    fn a_folder_replaces_all_kernels_and_must_have_each() {
        let folder = std::env::temp_dir().join(format!("tandem-cubins-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("embed.cubin"), b"rebuilt").unwrap();
        assert_eq!(kernel("embed").image((8, 6), Some(&folder)), Ok(Image::Cubin(Cow::Borrowed(b"rebuilt"))));
        let error = kernel("sample").image((8, 6), Some(&folder)).unwrap_err().to_string();
        assert!(error.contains("sample.cubin cannot be read") && error.contains(KERNELS_FOLDER_VARIABLE), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
