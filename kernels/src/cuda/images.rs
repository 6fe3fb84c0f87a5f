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
                Ok(bytes) if is_whole_elf(&bytes) => Ok(Image::Cubin(Cow::Owned(bytes))),
                Ok(bytes) => {
                    let reason = format!("its {} bytes are no whole ELF file of 64 bits", bytes.len());
                    Err(ImageError::Unreadable { path, reason })
                }
                Err(error) => Err(ImageError::Unreadable { path, reason: error.to_string() }),
            };
        }
        match self.ptx {
            Some(ptx) if capability != (9, 0) => Ok(Image::Ptx(ptx)),
            _ => Ok(Image::Cubin(Cow::Borrowed(self.cubin))),
        }
    }
}

/// Whether the headers, and every section and segment that they name, lie within the file. A driver is handed an address
/// without a length: of a file that was cut short it would read what is behind.
fn is_whole_elf(bytes: &[u8]) -> bool {
    const HEADER_BYTES: usize = 64;
    const NO_BITS: u64 = 8; // a section that has a size and nothing in the file
    // Little-endian.
    let number = |at: usize, num_bytes: usize| {
        let field = bytes.get(at..at.checked_add(num_bytes)?)?;
        Some(field.iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte)))
    };
    let is_within = |offset: u64, size: u64| offset.checked_add(size).is_some_and(|end| end <= bytes.len() as u64);
    // A table of headers: where its offset, entry size and count are in the file's header, and the least size.
    let table = |offset: usize, entry_size: usize, entry_bytes_min: u64| {
        let (offset, size) = (number(offset, 8)?, number(entry_size, 2)?);
        let count = number(entry_size + 2, 2)?;
        let is_table = count == 0 || (size >= entry_bytes_min && is_within(offset, size * count));
        is_table.then(|| (0..count).map(move |i| (offset + i * size) as usize))
    };
    let whole = || {
        let sections: Vec<usize> = table(40, 58, 64)?.collect();
        for at in &sections {
            let is_in_file = number(at + 4, 4)? != NO_BITS;
            if is_in_file && !is_within(number(at + 24, 8)?, number(at + 32, 8)?) {
                return None;
            }
        }
        for at in table(32, 54, 56)? {
            if !is_within(number(at + 8, 8)?, number(at + 32, 8)?) {
                return None;
            }
        }
        Some(!sections.is_empty())
    };
    bytes.len() >= HEADER_BYTES && bytes.starts_with(b"\x7fELF\x02\x01") && whole().unwrap_or(false)
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
        // As good as any other: a folder is taken for every device.
        let rebuilt = kernel("digest").cubin;
        std::fs::write(folder.join("embed.cubin"), rebuilt).unwrap();
        assert_eq!(kernel("embed").image((8, 6), Some(&folder)), Ok(Image::Cubin(Cow::Borrowed(rebuilt))));
        for broken in [&[][..], b"rebuilt", &rebuilt[..64], &rebuilt[..rebuilt.len() - 1]] {
            std::fs::write(folder.join("embed.cubin"), broken).unwrap();
            let error = kernel("embed").image((9, 0), Some(&folder)).unwrap_err().to_string();
            let told = format!("embed.cubin cannot be read (its {} bytes are no whole ELF file", broken.len());
            assert!(error.contains(&told), "{error}");
        }
        let error = kernel("sample").image((8, 6), Some(&folder)).unwrap_err().to_string();
        assert!(error.contains("sample.cubin cannot be read") && error.contains(KERNELS_FOLDER_VARIABLE), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn an_image_is_whole_only_with_its_last_byte_and_whatever_its_header_says_is_checked() {
        for kernel in EMBEDDED {
            assert!(is_whole_elf(kernel.cubin), "{}", kernel.name);
            let ends = (0..kernel.cubin.len()).rev().step_by(97);
            assert!(ends.into_iter().all(|end| !is_whole_elf(&kernel.cubin[..end])), "{}", kernel.name);
        }
        // Offsets, sizes and counts beyond the file, and such that their sums wrap.
        let cubin = kernel("digest").cubin;
        for at in (4..6).chain(42..48).chain([59, 61]) {
            let mut broken = cubin.to_vec();
            broken[at] = 0xff;
            assert!(!is_whole_elf(&broken), "byte {at}");
        }
        let first = u64::from_le_bytes(cubin[40..48].try_into().unwrap()) as usize + 64;
        for field in [24, 32] {
            let mut broken = cubin.to_vec();
            broken[first + field..first + field + 8].fill(0xff);
            assert!(!is_whole_elf(&broken), "field {field}");
        }
    }
}
