//! NVML return codes and their texts.

use std::ffi::CStr;
use std::fmt;

/// An NVML return code other than `NVML_SUCCESS`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Code(pub u32);

/// What every simulated call comes to.
pub type Outcome<T> = Result<T, Code>;

impl Code {
    /// `NVML_ERROR_UNINITIALIZED`
    pub const UNINITIALIZED: Self = Self(1);
    /// `NVML_ERROR_INVALID_ARGUMENT`
    pub const INVALID_ARGUMENT: Self = Self(2);
    /// `NVML_ERROR_NOT_SUPPORTED`
    pub const NOT_SUPPORTED: Self = Self(3);
    /// `NVML_ERROR_NO_PERMISSION`
    pub const NO_PERMISSION: Self = Self(4);
    /// `NVML_ERROR_NOT_FOUND`
    pub const NOT_FOUND: Self = Self(6);
    /// `NVML_ERROR_INSUFFICIENT_SIZE`
    pub const INSUFFICIENT_SIZE: Self = Self(7);
    /// `NVML_ERROR_DRIVER_NOT_LOADED`
    pub const DRIVER_NOT_LOADED: Self = Self(9);
    /// `NVML_ERROR_TIMEOUT`
    pub const TIMEOUT: Self = Self(10);
    /// `NVML_ERROR_RESET_REQUIRED`
    pub const RESET_REQUIRED: Self = Self(16);
    /// `NVML_ERROR_IN_USE`
    pub const IN_USE: Self = Self(19);
    /// `NVML_ERROR_INSUFFICIENT_RESOURCES`
    pub const INSUFFICIENT_RESOURCES: Self = Self(23);
    /// `NVML_ERROR_UNKNOWN`
    pub const UNKNOWN: Self = Self(999);

    /// The code named by `text`: any number, also one that no header knows, or its NVML name with or without `NVML_ERROR_`.
    pub fn parse(text: &str) -> Option<Self> {
        let name = text.trim_start_matches("NVML_ERROR_");
        let named = || TEXTS.iter().find(|(_, known, _)| known.eq_ignore_ascii_case(name)).map(|(number, ..)| *number);
        text.parse().ok().or_else(named).filter(|number| *number != 0).map(Self)
    }

    /// The NVML name without `NVML_ERROR_`.
    pub fn name(self) -> &'static str {
        TEXTS.iter().find(|(number, ..)| *number == self.0).map_or("UNKNOWN", |(_, name, _)| name)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (NVML_ERROR_{}, {})", text(self.0).to_string_lossy(), self.name(), self.0)
    }
}

/// The text of `nvmlErrorString`, as nvidia-smi prints it.
pub fn text(number: u32) -> &'static CStr {
    TEXTS.iter().find(|(known, ..)| *known == number).map_or(c"Unknown Error", |(.., text)| text)
}

const TEXTS: [(u32, &str, &CStr); 32] = [
    (0, "SUCCESS", c"Success"),
    (1, "UNINITIALIZED", c"Uninitialized"),
    (2, "INVALID_ARGUMENT", c"Invalid Argument"),
    (3, "NOT_SUPPORTED", c"Not Supported"),
    (4, "NO_PERMISSION", c"Insufficient Permissions"),
    (5, "ALREADY_INITIALIZED", c"Already Initialized"),
    (6, "NOT_FOUND", c"Not Found"),
    (7, "INSUFFICIENT_SIZE", c"Insufficient Size"),
    (8, "INSUFFICIENT_POWER", c"Insufficient External Power"),
    (9, "DRIVER_NOT_LOADED", c"Driver Not Loaded"),
    (10, "TIMEOUT", c"Timeout"),
    (11, "IRQ_ISSUE", c"Interrupt Request Issue"),
    (12, "LIBRARY_NOT_FOUND", c"NVML Shared Library Not Found"),
    (13, "FUNCTION_NOT_FOUND", c"Function Not Found"),
    (14, "CORRUPTED_INFOROM", c"Corrupted infoROM"),
    (15, "GPU_IS_LOST", c"GPU is lost"),
    (16, "RESET_REQUIRED", c"GPU requires reset"),
    (17, "OPERATING_SYSTEM", c"GPU access blocked by the operating system"),
    (18, "LIB_RM_VERSION_MISMATCH", c"Driver/library version mismatch"),
    (19, "IN_USE", c"In use by another client"),
    (20, "MEMORY", c"Insufficient Memory"),
    (21, "NO_DATA", c"No data"),
    (22, "VGPU_ECC_NOT_SUPPORTED", c"The requested vgpu operation is not available on target device"),
    (23, "INSUFFICIENT_RESOURCES", c"Insufficient Resources"),
    (24, "FREQ_NOT_SUPPORTED", c"Frequency not supported"),
    (25, "ARGUMENT_VERSION_MISMATCH", c"Argument version mismatch"),
    (26, "DEPRECATED", c"Deprecated"),
    (27, "NOT_READY", c"Not ready"),
    (28, "GPU_NOT_FOUND", c"GPU not found"),
    (29, "INVALID_STATE", c"Invalid state"),
    (30, "RESET_TYPE_NOT_SUPPORTED", c"Reset type not supported"),
    (999, "UNKNOWN", c"Unknown Error"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_read_by_number_and_by_name() {
        for given in ["19", "IN_USE", "in_use", "NVML_ERROR_IN_USE"] {
            assert_eq!(Code::parse(given), Some(Code::IN_USE), "{given}");
        }
        assert_eq!(Code::parse("4242"), Some(Code(4242)));
        for given in ["0", "SUCCESS", "-1", "", "BUSY"] {
            assert_eq!(Code::parse(given), None, "{given}");
        }
    }

    #[test]
    fn texts_are_those_nvidia_smi_prints() {
        assert_eq!(text(19), c"In use by another client");
        assert_eq!(text(23), c"Insufficient Resources");
        assert_eq!(text(4), c"Insufficient Permissions");
        assert_eq!(text(777), c"Unknown Error");
    }
}
