//! What the driver refuses, as a sentence.

use std::ffi::CStr;

use cudarc::driver::DriverError;

use crate::cuda::device::DeviceError;

pub(super) fn refused(asked: impl Into<String>) -> impl FnOnce(DriverError) -> DeviceError {
    let asked = asked.into();
    move |error| DeviceError::Refused { asked, reason: format!("the NVIDIA driver says {}", sentence(error)) }
}

/// An error by its name and in words.
fn sentence(error: DriverError) -> String {
    let text = |text: Result<&CStr, _>| text.map(|text: &CStr| text.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Ok(name), Ok(words)) => format!("{name}: {words}"),
        _ => format!("error {}", error.0 as u32),
    }
}
