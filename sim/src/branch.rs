//! Which calls the library of a driver branch has.
//!
//! R460 and R470: the names in NVIDIA's Python bindings of these branches (nvidia-ml-py 11.460.79 and 11.470.66), and the
//! older names that headers keep for programs built before. R535: the header of CUDA 12.2. All of the header of CUDA 13.0:
//! R580. A branch in between has what is certain: the calls of the older one. Before R460 it has those of R460.

/// Calls that came after R460, in R470 at the latest.
const AFTER_460: [&str; 9] = [
    "nvmlDeviceGetClkMonStatus",
    "nvmlDeviceGetGpuInstancePossiblePlacements_v2",
    "nvmlDeviceGetGridLicensableFeatures_v4",
    "nvmlDeviceGetMPSComputeRunningProcesses_v2",
    "nvmlDeviceGetNvLinkRemoteDeviceType",
    "nvmlDeviceResetMemoryLockedClocks",
    "nvmlDeviceSetMemoryLockedClocks",
    "nvmlGetExcludedDeviceCount",
    "nvmlGetExcludedDeviceInfoByIndex",
];

/// Calls that came after R470, in R535 at the latest.
const AFTER_470: [&str; 76] = [
    "nvmlDeviceClearFieldValues",
    "nvmlDeviceGetAdaptiveClockInfoStatus",
    "nvmlDeviceGetBusType",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetConfComputeGpuAttestationReport",
    "nvmlDeviceGetConfComputeGpuCertificate",
    "nvmlDeviceGetConfComputeMemSizeInfo",
    "nvmlDeviceGetConfComputeProtectedMemoryUsage",
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetDefaultEccMode",
    "nvmlDeviceGetDynamicPstatesInfo",
    "nvmlDeviceGetFanControlPolicy_v2",
    "nvmlDeviceGetGpcClkMinMaxVfOffset",
    "nvmlDeviceGetGpcClkVfOffset",
    "nvmlDeviceGetGpuFabricInfo",
    "nvmlDeviceGetGpuInstanceProfileInfoV",
    "nvmlDeviceGetGpuMaxPcieLinkGeneration",
    "nvmlDeviceGetGraphicsRunningProcesses_v3",
    "nvmlDeviceGetGspFirmwareMode",
    "nvmlDeviceGetGspFirmwareVersion",
    "nvmlDeviceGetIrqNum",
    "nvmlDeviceGetJpgUtilization",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3",
    "nvmlDeviceGetMemClkMinMaxVfOffset",
    "nvmlDeviceGetMemClkVfOffset",
    "nvmlDeviceGetMemoryBusWidth",
    "nvmlDeviceGetMemoryInfo_v2",
    "nvmlDeviceGetMinMaxClockOfPState",
    "nvmlDeviceGetMinMaxFanSpeed",
    "nvmlDeviceGetModuleId",
    "nvmlDeviceGetNumFans",
    "nvmlDeviceGetNumGpuCores",
    "nvmlDeviceGetOfaUtilization",
    "nvmlDeviceGetPcieLinkMaxSpeed",
    "nvmlDeviceGetPcieSpeed",
    "nvmlDeviceGetPowerSource",
    "nvmlDeviceGetRunningProcessDetailList",
    "nvmlDeviceGetSupportedClocksEventReasons",
    "nvmlDeviceGetSupportedPerformanceStates",
    "nvmlDeviceGetTargetFanSpeed",
    "nvmlDeviceGetThermalSettings",
    "nvmlDeviceGetVgpuCapabilities",
    "nvmlDeviceGetVgpuSchedulerCapabilities",
    "nvmlDeviceGetVgpuSchedulerLog",
    "nvmlDeviceGetVgpuSchedulerState",
    "nvmlDeviceSetConfComputeUnprotectedMemSize",
    "nvmlDeviceSetDefaultFanSpeed_v2",
    "nvmlDeviceSetFanControlPolicy",
    "nvmlDeviceSetFanSpeed_v2",
    "nvmlDeviceSetGpcClkVfOffset",
    "nvmlDeviceSetMemClkVfOffset",
    "nvmlDeviceSetNvLinkDeviceLowPowerThreshold",
    "nvmlDeviceSetPowerManagementLimit_v2",
    "nvmlDeviceSetVgpuSchedulerState",
    "nvmlGetVgpuDriverCapabilities",
    "nvmlGpmMetricsGet",
    "nvmlGpmMigSampleGet",
    "nvmlGpmQueryDeviceSupport",
    "nvmlGpmQueryIfStreamingEnabled",
    "nvmlGpmSampleAlloc",
    "nvmlGpmSampleFree",
    "nvmlGpmSampleGet",
    "nvmlGpmSetStreamingEnabled",
    "nvmlGpuInstanceCreateComputeInstanceWithPlacement",
    "nvmlGpuInstanceGetComputeInstancePossiblePlacements",
    "nvmlGpuInstanceGetComputeInstanceProfileInfoV",
    "nvmlSystemGetConfComputeCapabilities",
    "nvmlSystemGetConfComputeGpusReadyState",
    "nvmlSystemGetConfComputeState",
    "nvmlSystemGetNvlinkBwMode",
    "nvmlSystemSetConfComputeGpusReadyState",
    "nvmlSystemSetNvlinkBwMode",
    "nvmlVgpuInstanceGetGpuPciId",
    "nvmlVgpuInstanceGetLicenseInfo",
    "nvmlVgpuInstanceGetLicenseInfo_v2",
    "nvmlVgpuTypeGetCapabilities",
];

/// Calls that came after R535.
const AFTER_535: [&str; 69] = [
    "nvmlDeviceGetAddressingMode",
    "nvmlDeviceGetC2cModeInfoV",
    "nvmlDeviceGetCapabilities",
    "nvmlDeviceGetClockOffsets",
    "nvmlDeviceGetCoolerInfo",
    "nvmlDeviceGetCurrentClockFreqs",
    "nvmlDeviceGetDramEncryptionMode",
    "nvmlDeviceGetDriverModel_v2",
    "nvmlDeviceGetFanSpeedRPM",
    "nvmlDeviceGetGpuFabricInfoV",
    "nvmlDeviceGetGpuInstanceProfileInfoByIdV",
    "nvmlDeviceGetHandleByUUIDV",
    "nvmlDeviceGetLastBBXFlushTime",
    "nvmlDeviceGetMarginTemperature",
    "nvmlDeviceGetNumaNodeId",
    "nvmlDeviceGetNvLinkInfo",
    "nvmlDeviceGetNvlinkBwMode",
    "nvmlDeviceGetNvlinkSupportedBwModes",
    "nvmlDeviceGetPciInfoExt",
    "nvmlDeviceGetPdi",
    "nvmlDeviceGetPerformanceModes",
    "nvmlDeviceGetPlatformInfo",
    "nvmlDeviceGetPowerMizerMode_v1",
    "nvmlDeviceGetProcessesUtilizationInfo",
    "nvmlDeviceGetRepairStatus",
    "nvmlDeviceGetSramEccErrorStatus",
    "nvmlDeviceGetSramUniqueUncorrectedEccErrorCounts",
    "nvmlDeviceGetTemperatureV",
    "nvmlDeviceGetVgpuHeterogeneousMode",
    "nvmlDeviceGetVgpuInstancesUtilizationInfo",
    "nvmlDeviceGetVgpuProcessesUtilizationInfo",
    "nvmlDeviceGetVgpuTypeCreatablePlacements",
    "nvmlDeviceGetVgpuTypeSupportedPlacements",
    "nvmlDevicePowerSmoothingActivatePresetProfile",
    "nvmlDevicePowerSmoothingSetState",
    "nvmlDevicePowerSmoothingUpdatePresetProfileParam",
    "nvmlDeviceReadWritePRM_v1",
    "nvmlDeviceSetClockOffsets",
    "nvmlDeviceSetDramEncryptionMode",
    "nvmlDeviceSetNvlinkBwMode",
    "nvmlDeviceSetPowerMizerMode_v1",
    "nvmlDeviceSetVgpuCapabilities",
    "nvmlDeviceSetVgpuHeterogeneousMode",
    "nvmlDeviceWorkloadPowerProfileClearRequestedProfiles",
    "nvmlDeviceWorkloadPowerProfileGetCurrentProfiles",
    "nvmlDeviceWorkloadPowerProfileGetProfilesInfo",
    "nvmlDeviceWorkloadPowerProfileSetRequestedProfiles",
    "nvmlGpuInstanceGetActiveVgpus",
    "nvmlGpuInstanceGetCreatableVgpus",
    "nvmlGpuInstanceGetVgpuHeterogeneousMode",
    "nvmlGpuInstanceGetVgpuSchedulerLog",
    "nvmlGpuInstanceGetVgpuSchedulerState",
    "nvmlGpuInstanceGetVgpuTypeCreatablePlacements",
    "nvmlGpuInstanceSetVgpuHeterogeneousMode",
    "nvmlGpuInstanceSetVgpuSchedulerState",
    "nvmlSystemEventSetCreate",
    "nvmlSystemEventSetFree",
    "nvmlSystemEventSetWait",
    "nvmlSystemGetConfComputeKeyRotationThresholdInfo",
    "nvmlSystemGetConfComputeSettings",
    "nvmlSystemGetDriverBranch",
    "nvmlSystemRegisterEvents",
    "nvmlSystemSetConfComputeKeyRotationThresholdInfo",
    "nvmlVgpuInstanceGetPlacementId",
    "nvmlVgpuInstanceGetRuntimeStateSize",
    "nvmlVgpuTypeGetBAR1Info",
    "nvmlVgpuTypeGetFbReservation",
    "nvmlVgpuTypeGetGspHeapSize",
    "nvmlVgpuTypeGetMaxInstancesPerGpuInstance",
];

/// The branch of a driver: 535 of `535.104.05`.
pub fn of_version(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

/// The calls that the library of a branch lacks.
pub fn missing(branch: u32) -> Vec<&'static str> {
    let lists: [(u32, &[&str]); 3] = [(470, &AFTER_460), (535, &AFTER_470), (580, &AFTER_535)];
    lists.iter().filter(|(first, _)| branch < *first).flat_map(|(_, calls)| *calls).copied().collect()
}

/// The first branch that drives boards of an architecture: Hopper came with CUDA 11.8, Blackwell with CUDA 12.8.
pub fn first_for(architecture: &str) -> u32 {
    match architecture {
        "Hopper" => 520,
        "Blackwell" => 570,
        _ => 450,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calls;

    #[test]
    fn a_newer_branch_lacks_nothing_that_an_older_one_has() {
        assert_eq!(missing(580), [""; 0]);
        let (old, newer) = (missing(470), missing(535));
        assert!(newer.iter().all(|call| old.contains(call)) && newer.len() < old.len());
        assert_eq!((missing(525), missing(550)), (old.clone(), newer));
        assert!(old.iter().all(|call| missing(450).contains(call)));
    }

    #[test]
    fn the_lists_name_calls_of_ours_once() {
        let known = calls::names();
        let all = missing(450);
        for (place, call) in all.iter().enumerate() {
            assert!(known.contains(call) && !all[..place].contains(call), "{call}");
        }
    }

    /// NVIDIA's header files and bindings of the branches; for 535 the symbols of Debian's library, too.
    #[test]
    fn the_calls_for_mig_came_when_they_came() {
        let lacks = |branch: u32, call: &str| missing(branch).contains(&call);
        for call in ["nvmlDeviceGetGpuInstanceProfileInfoV", "nvmlDeviceGetMemoryInfo_v2", "nvmlGpmMigSampleGet"] {
            assert!(lacks(470, call) && !lacks(535, call), "{call}");
        }
        let placements = "nvmlDeviceGetGpuInstancePossiblePlacements_v2";
        assert!(lacks(460, placements) && !lacks(470, placements));
        for call in ["nvmlDeviceGetGpuInstanceProfileInfoByIdV", "nvmlDeviceGetHandleByUUIDV"] {
            assert!(lacks(535, call) && !lacks(580, call), "{call}");
        }
        for call in ["nvmlDeviceCreateGpuInstanceWithPlacement", "nvmlDeviceGetComputeRunningProcesses_v2"] {
            assert!(!lacks(470, call), "{call}");
        }
    }
}
