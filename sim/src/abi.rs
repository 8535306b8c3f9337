//! The C boundary: what a caller hands over, and how an exported call is made of a body.
//!
//! The types below stand for the pointers of the NVML prototypes. Only a C caller makes them, and NVML's
//! contract is the proof for every access here: a pointer is null or good for what the prototype says.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, OsStr, c_char, c_uint, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nvml_wrapper_sys::bindings::{nvmlComputeInstance_t, nvmlDevice_t, nvmlGpuInstance_t};

use crate::code::{Code, Outcome};

/// Something the caller wants written.
#[repr(transparent)]
#[derive(Debug)]
pub struct Out<T>(*mut T);

impl<T: Copy> Out<T> {
    /// Refuses null. Before an effect, so that a bad call has none.
    pub fn check(&self) -> Outcome<()> {
        if self.0.is_null() { Err(Code::INVALID_ARGUMENT) } else { Ok(()) }
    }

    /// Writes it.
    pub fn put(&self, value: T) -> Outcome<()> {
        self.check()?;
        // SAFETY: not null, so good for one T; unaligned writes ask nothing about alignment.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// Reads what the caller put there first.
    pub fn get(&self) -> Outcome<T> {
        self.check()?;
        // SAFETY: not null, so it holds one T, of a type that any bytes make.
        Ok(unsafe { self.0.read_unaligned() })
    }
}

/// Something the caller wants read.
#[repr(transparent)]
#[derive(Debug)]
pub struct In<T>(*const T);

impl<T: Copy> In<T> {
    /// Reads it.
    pub fn get(&self) -> Outcome<T> {
        if self.0.is_null() {
            return Err(Code::INVALID_ARGUMENT);
        }
        // SAFETY: not null, so it holds one T, of a type that any bytes make.
        Ok(unsafe { self.0.read_unaligned() })
    }
}

/// A C string of the caller.
#[repr(transparent)]
#[derive(Debug)]
pub struct InText(*const c_char);

impl InText {
    /// Reads it.
    pub fn get(&self) -> Outcome<String> {
        if self.0.is_null() {
            return Err(Code::INVALID_ARGUMENT);
        }
        // SAFETY: not null, so it points to a string with its terminator.
        Ok(unsafe { CStr::from_ptr(self.0) }.to_string_lossy().into_owned())
    }
}

/// An array that the caller wants filled.
#[repr(transparent)]
#[derive(Debug)]
pub struct Array<T>(*mut T);

impl<T: Copy> Array<T> {
    /// Whether there is none.
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// Writes all of `values`; the call's contract or its count says that they fit.
    pub fn fill(&self, values: &[T]) -> Outcome<()> {
        if self.0.is_null() {
            return if values.is_empty() { Ok(()) } else { Err(Code::INVALID_ARGUMENT) };
        }
        for (place, value) in values.iter().enumerate() {
            let at = self.0.wrapping_add(place);
            // SAFETY: the caller's array holds as many as the call may return.
            unsafe { at.write_unaligned(*value) };
        }
        Ok(())
    }

    /// Reads its first values; the call's contract or its count says that there are as many.
    pub fn read(&self, count: usize) -> Outcome<Vec<T>> {
        (0..count).map(|place| Out(self.0.wrapping_add(place)).get()).collect()
    }
}

/// A character buffer whose length is the next argument.
#[repr(transparent)]
#[derive(Debug)]
pub struct Text(*mut c_char);

impl Text {
    /// Writes `text` and its terminator.
    pub fn put(&self, text: &str, length: c_uint) -> Outcome<()> {
        if self.0.is_null() {
            return Err(Code::INVALID_ARGUMENT);
        }
        let text = CString::new(text).map_err(|_| Code::UNKNOWN)?;
        if text.as_bytes_with_nul().len() > length as usize {
            return Err(Code::INSUFFICIENT_SIZE);
        }
        Array(self.0.cast()).fill(text.as_bytes_with_nul())
    }
}

/// A struct whose first word says which one it is.
#[repr(transparent)]
#[derive(Debug)]
pub struct Versioned(*mut c_void);

impl Versioned {
    /// The version word.
    pub fn version(&self) -> Outcome<u32> {
        Out(self.0.cast::<u32>()).get()
    }

    /// Writes the struct that the version word promised.
    pub fn put<T: Copy>(&self, value: T) -> Outcome<()> {
        Out(self.0.cast::<T>()).put(value)
    }

    /// Reads the struct that the version word promised.
    pub fn get<T: Copy>(&self) -> Outcome<T> {
        Out(self.0.cast::<T>()).get()
    }

    /// The array that lies behind its first fields.
    pub fn array_after<Fields, T>(&self) -> Array<T> {
        Array(self.0.cast::<u8>().wrapping_add(size_of::<Fields>()).cast())
    }
}

/// What a handle stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// A GPU by NVML index.
    Gpu(usize),
    /// A GPU instance.
    Gi {
        /// NVML index.
        gpu: usize,
        /// Its id.
        gi: u32,
        /// Which of all that ever had this id.
        birth: u32,
    },
    /// A compute instance, or the MIG device that it makes.
    Ci {
        /// NVML index.
        gpu: usize,
        /// Id of its GPU instance.
        gi: u32,
        /// Its id.
        ci: u32,
        /// Which of all that ever had this id.
        birth: u32,
        /// The MIG device is meant.
        device: bool,
    },
}

/// A handle of any of the three handle types. It is a number, never an address: nothing is freed, and a
/// stale one is known by its birth.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Handle(usize);

const _: () = assert!(size_of::<usize>() == 8, "handles need 64 bits");

const MAGIC: usize = 0x4d;

impl Handle {
    /// The handle of a target.
    pub fn of(target: Target) -> Self {
        let (kind, gpu, gi, ci, birth) = match target {
            Target::Gpu(gpu) => (1, gpu, 0, 0, 0),
            Target::Gi { gpu, gi, birth } => (2, gpu, gi, 0, birth),
            Target::Ci { gpu, gi, ci, birth, device } => (3 + usize::from(device), gpu, gi, ci, birth),
        };
        Self(MAGIC << 56 | kind << 52 | gpu << 44 | (gi as usize) << 40 | (ci as usize) << 36 | birth as usize)
    }

    /// The target of a handle, if it is one of ours.
    pub fn target(self) -> Outcome<Target> {
        let field = |at: u32, bits: u32| self.0 >> at & ((1 << bits) - 1);
        if field(56, 8) != MAGIC || field(32, 4) != 0 {
            return Err(Code::INVALID_ARGUMENT);
        }
        let (gpu, gi, ci, birth) = (field(44, 8), field(40, 4) as u32, field(36, 4) as u32, field(0, 32) as u32);
        match field(52, 4) {
            1 => Ok(Target::Gpu(gpu)),
            2 => Ok(Target::Gi { gpu, gi, birth }),
            kind @ (3 | 4) => Ok(Target::Ci { gpu, gi, ci, birth, device: kind == 4 }),
            _ => Err(Code::INVALID_ARGUMENT),
        }
    }

    /// The NVML index of the GPU that it is, or lies on.
    pub fn gpu(self) -> Outcome<usize> {
        let (Target::Gpu(gpu) | Target::Gi { gpu, .. } | Target::Ci { gpu, .. }) = self.target()?;
        Ok(gpu)
    }

    /// For a struct that holds a device.
    pub fn device(self) -> nvmlDevice_t {
        std::ptr::without_provenance_mut(self.0)
    }

    /// For a struct that holds a GPU instance.
    pub fn gpu_instance(self) -> nvmlGpuInstance_t {
        std::ptr::without_provenance_mut(self.0)
    }

    /// For a struct that holds a compute instance.
    pub fn compute_instance(self) -> nvmlComputeInstance_t {
        std::ptr::without_provenance_mut(self.0)
    }
}

/// A name for a fixed character field.
pub fn name_field<const N: usize>(text: &str) -> [c_char; N] {
    let mut field = [0; N];
    for (to, from) in field.iter_mut().take(N.saturating_sub(1)).zip(text.bytes()) {
        *to = from as c_char;
    }
    field
}

/// The file that this code was loaded from.
pub fn library() -> Option<PathBuf> {
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    let here = library as fn() -> Option<PathBuf> as *const c_void;
    // SAFETY: `here` lies in this library and `info` is ours to write.
    if unsafe { libc::dladdr(here, &mut info) } == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: dladdr succeeded, so the name is a C string that lives as long as the library.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    // dladdr repeats the path that dlopen was given: relative, or through a link.
    std::fs::canonicalize(OsStr::from_bytes(name.to_bytes())).ok()
}

/// Exports calls under their NVML names and lists the names.
macro_rules! exports {
    ($( $(#[$attr:meta])* fn $name:ident($($arg:ident : $type:ty),* $(,)?) |$call:ident| $body:block )*) => {
        /// The names of the calls made here.
        pub(crate) const NAMES: &[&str] = &[$(stringify!($name)),*];
        $(
            $(#[$attr])*
            #[allow(unsafe_code, non_snake_case, missing_docs)]
            #[unsafe(no_mangle)]
            pub extern "C" fn $name($($arg: $type),*) -> ::std::ffi::c_uint {
                $crate::session::call(stringify!($name), &[$(&$arg),*], |$call| $body)
            }
        )*
    };
}
pub(crate) use exports;

/// Exports functions that need no machine, or not yet.
macro_rules! exports_bare {
    ($( fn $name:ident($($arg:ident : $type:ty),* $(,)?) -> $return:ty $body:block )*) => {
        $(
            #[allow(unsafe_code, non_snake_case, missing_docs)]
            #[unsafe(no_mangle)]
            pub extern "C" fn $name($($arg: $type),*) -> $return $body
        )*
    };
}
pub(crate) use exports_bare;
