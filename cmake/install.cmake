# libmlcore for C and C++ programs: headers, library, and the package that find_package(mlcore) reads.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

add_library(mlcore SHARED)
add_library(mlcore::mlcore ALIAS mlcore)
target_link_libraries(mlcore PRIVATE mlcore_objects ${isa_objects} $<BUILD_INTERFACE:mlcore_flags> OpenMP::OpenMP_CXX)
target_include_directories(mlcore PUBLIC
  "$<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include>" "$<BUILD_INTERFACE:${PROJECT_BINARY_DIR}/include>"
  "$<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>")
set_target_properties(mlcore PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR})

set(libraries mlcore)
if(MLCORE_HAS_CUDA)
  list(APPEND libraries mlcore_cuda)
endif()
install(TARGETS ${libraries} EXPORT mlcoreTargets COMPONENT dev
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT dev
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT dev)
install(DIRECTORY "${PROJECT_SOURCE_DIR}/csrc/include/mlcore" "${PROJECT_BINARY_DIR}/include/mlcore"
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT dev FILES_MATCHING PATTERN "*.h" PATTERN "*.inc")
install(EXPORT mlcoreTargets NAMESPACE mlcore:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/mlcore COMPONENT dev)
configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/mlcoreConfig.cmake.in" "${PROJECT_BINARY_DIR}/mlcoreConfig.cmake"
  INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/mlcore)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/mlcoreConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/mlcoreConfig.cmake" "${PROJECT_BINARY_DIR}/mlcoreConfigVersion.cmake"
  DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/mlcore COMPONENT dev)
